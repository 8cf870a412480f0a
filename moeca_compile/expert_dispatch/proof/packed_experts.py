"""Experts kept as stacked parameters [E, ., .] and used by slices: `F.linear(x, self.gate_up_proj[e])`.

As Hugging Face transformers keeps them. There is no expert module to ask, so every reading of the parameters (roles,
transposition, which half is the gate, activation) is compared with the dispatch method as a whole. Each expert gets a
window of one random buffer in place of its weights: all differ, and the memory is that of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch.proof.anatomy import CHANGED, SAME, is_plain
from moeca_compile.expert_dispatch.proof.experts import ALL_ROWS, Rows, halves
from moeca_compile.expert_dispatch.proof.harness import Harness
from moeca_compile.expert_dispatch.proof.probe import random_parameters
from moeca_compile.expert_dispatch.routed import Experts, operator
from moeca_compile.ops.experts import ACTIVATIONS, WeightLists


def packed_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters that can hold one matrix per expert: [E, ., .]."""
    present = {name: p for name, p in module._parameters.items() if p is not None}
    return {name: p for name, p in present.items() if p.dim() == 3 and p.shape[0] > 1}


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Some output rows of a parameter [E, out, in], or [E, in, out] where `transposed`; `shape` leaves E out.

    `on_meta`: it was proven without data, for a dry run. Otherwise a parameter on the meta device is offloaded.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    rows: Rows = ALL_ROWS
    on_meta: bool = False

    def holds(self, owner: nn.Module) -> bool:
        """Whether the parameter is there, in the shape and of the kind that was proven."""
        p = owner._parameters.get(self.name)
        if p is None or (p.device.type == "meta" and not self.on_meta):
            return False
        return is_plain(p) and p.shape[1:] == self.shape

    def tensors(self, owner: nn.Module) -> list[Tensor]:
        """E weights [out, in]: views."""
        weights = owner._parameters[self.name]
        assert weights is not None
        parts = [weight.t() if self.transposed else weight for weight in weights.unbind(0)]
        return parts if self.rows == ALL_ROWS else [part[slice(*self.rows)] for part in parts]

    def sizes(self, owner: nn.Module) -> tuple[int, int]:
        """(out, in) of one expert's weight, before `rows`."""
        weights = owner._parameters[self.name]
        assert weights is not None
        return (weights.shape[2], weights.shape[1]) if self.transposed else (weights.shape[1], weights.shape[2])


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """One reading of a module's packed parameters."""

    up: PackedPart
    down: PackedPart
    gate: PackedPart | None
    activation: str
    in_features: int
    out_features: int

    @property
    def gated(self) -> bool:
        return self.gate is not None

    def weights(self, owner: nn.Module) -> WeightLists:
        gate = self.gate.tensors(owner) if self.gate is not None else []
        return self.up.tensors(owner), self.down.tensors(owner), gate, [], [], []

    @property
    def exhaustive(self) -> bool:
        return False

    def condition(self, owner: nn.Module) -> int:
        """The parameters are read here, whatever the module's class or forward has become: so they have to be there."""
        for part in (self.up, self.down, self.gate):
            if part is not None and not part.holds(owner):
                return CHANGED
        return SAME

    def branches(self, owner: nn.Module, tokens: Tensor, ids: Tensor, *extra: Tensor) -> Tensor:
        return operator(tokens, ids, self.weights(owner), self.activation)

    def dtype(self, owner: nn.Module) -> torch.dtype:
        return self.weights(owner)[0][0].dtype

    def count(self, owner: nn.Module) -> int:
        weights = owner._parameters[self.up.name]
        assert weights is not None
        return weights.shape[0]


class PackedHarness(Harness):
    """A module under test whose packed experts are random and all different."""

    def __init__(self, module: nn.Module, experts: Experts, readings: Sequence[PackedExperts] = ()) -> None:
        super().__init__(module, experts)
        self.readings = readings or (experts,)

    def parameters(self) -> dict[int, Tensor]:
        packed = packed_weights(self.module).values()
        made = random_parameters(self.module, self.device, skip=[id(p) for p in packed])
        generator = torch.Generator(self.device).manual_seed(1)
        for p in packed:
            count, *shape = p.shape
            buffer = torch.empty(shape[0] * shape[1] + count, device=self.device, dtype=torch.float32)
            bound = 2.0 * (3 / shape[1]) ** 0.5
            buffer.uniform_(-bound, bound, generator=generator)
            window = buffer.as_strided((count, *shape), (1, shape[1], 1))
            made[id(p)] = nn.Parameter(window, requires_grad=False)
        return made


def weights_problem(module: nn.Module) -> str:
    """Why stacked weights can't be those of one mixture of (gated) MLPs, or ''."""
    packed = packed_weights(module)
    if len({p.shape[0] for p in packed.values()}) > 1:
        return f"its packed weights {shapes_of(module)} are for different numbers of experts"
    for name, p in packed.items():
        if not is_plain(p):
            return f"it has quantized or sharded weights ({name} is a {type(p).__name__} of {p.dtype})"
    return ""


def readings(module: nn.Module) -> Iterator[PackedExperts]:
    """Every assignment of the two or three stacked parameters to roles, each as it is or transposed, whose shapes fit.

    Neither order nor orientation shows in a name: at most 3! * 2^3 products are looked at, and shapes leave few.
    """
    packed = packed_weights(module)
    shapes = {name: tuple(p.shape[1:]) for name, p in packed.items()}
    if len(shapes) not in (2, 3):
        return
    on_meta = any(p.is_meta for p in packed.values())
    for order, turned in product(permutations(shapes), product((False, True), repeat=len(shapes))):
        parts = [PackedPart(name, shapes[name], t, on_meta=on_meta) for name, t in zip(order, turned, strict=True)]
        width, out = parts[0].sizes(module)[1], parts[1].sizes(module)[0]
        for up, down, gate in _roles(module, parts):
            for activation in ACTIVATIONS:
                yield PackedExperts(up, down, gate, activation, width, out)


_Roles = tuple[PackedPart, PackedPart, PackedPart | None]


def _roles(module: nn.Module, parts: Sequence[PackedPart]) -> Iterator[_Roles]:
    """(up, down, gate) for parameters in this order. The gate is the third, half of the first, or there is none."""
    up, down = parts[:2]
    (hidden, width), inner = up.sizes(module), down.sizes(module)[1]
    if len(parts) == 3:
        if parts[2].sizes(module) == (hidden, width) and inner == hidden:
            yield up, down, parts[2]
    elif inner == hidden:
        yield up, down, None
    elif 2 * inner == hidden:
        for up_rows, gate_rows in halves(inner):
            yield replace(up, rows=up_rows), down, replace(up, rows=gate_rows)


def shapes_of(module: nn.Module) -> str:
    return ", ".join(f"{name} {tuple(p.shape)}" for name, p in packed_weights(module).items())
