"""Experts kept as stacked parameters [E, ., .] and used by slices: `F.linear(x, self.gate_up_proj[e])`.

As Hugging Face transformers keeps them. There is no expert module to ask, so the dispatch method is run as a whole, and
every reading of the parameters (roles, transposition, which half is the gate, activation) is compared with it. Each
expert gets a window of one random buffer in place of its weights: all differ, and the memory is that of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moeca_compile.expert_dispatch.dispatch import methods, packed_weights
from moeca_compile.expert_dispatch.families import method
from moeca_compile.expert_dispatch.families.method import Layout, Trial
from moeca_compile.expert_dispatch.proof.anatomy import CHANGED, SAME, is_plain
from moeca_compile.expert_dispatch.proof.attempt import Candidate, Harness, run
from moeca_compile.expert_dispatch.proof.experts import ALL_ROWS, Rows, halves
from moeca_compile.expert_dispatch.proof.probe import isolated, random_parameters, relative_error, shadow
from moeca_compile.expert_dispatch.routed import operator
from moeca_compile.expert_dispatch.source.loop import Loop
from moeca_compile.expert_dispatch.source.method_source import read
from moeca_compile.ops.experts import ACTIVATIONS, WeightLists

_TOLERANCE = 1e-4  # float32, relative; the best reading wins


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Some output rows of a parameter [E, out, in], or [E, in, out] where `transposed`; `shape` leaves E out."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    rows: Rows = ALL_ROWS

    def holds(self, owner: nn.Module) -> bool:
        """Whether the parameter is there, in the shape and of the kind that was proven."""
        p = owner._parameters.get(self.name)
        return p is not None and p.device.type != "meta" and is_plain(p) and p.shape[1:] == self.shape

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


def propose(module: nn.Module, loop: Loop, layouts: Sequence[Layout]) -> Candidate | str | None:
    """The rewritten method, why there is none, or None where inference takes another method than this one."""
    if not method.fits(loop):
        if _passed_over(module, loop):
            return None
        given = ", ".join(loop.source.parameters[1:])
        return f"{loop.name} takes ({given}), not just tokens, ids and gate weights, each required"
    packed = packed_weights(module)
    if len({p.shape[0] for p in packed.values()}) > 1:
        return f"its packed weights {_shapes(module)} are for different numbers of experts"
    odd = next((name for name, p in packed.items() if not is_plain(p)), None)
    if odd is not None:
        return f"it has quantised or sharded weights ({odd} is a {type(packed[odd]).__name__} of {packed[odd].dtype})"
    readings = list(_readings(module))
    if not readings:
        return f"its packed weights {_shapes(module)} don't chain into a (gated) MLP"
    reason = ""
    for width in dict.fromkeys(reading.in_features for reading in readings):
        fitting = [reading for reading in readings if reading.in_features == width]
        harness = PackedHarness(module, fitting[0])
        for trial in method.trials(harness, loop, layouts):
            best = _best(harness, loop, trial, fitting)
            if best is None:
                continue
            candidate = trial.candidate(loop, best)
            problem = harness.disagreement(candidate)
            if not problem:
                return method.with_dtype(harness, candidate, trial)
            reason = reason or problem
    return reason or f"it is not the gate-weighted sum of (gated) MLPs read from {_shapes(module)}"


def _passed_over(module: nn.Module, loop: Loop) -> bool:
    """Whether `forward(x, counts)`, for tokens sorted by expert, calls another of the module's methods (a grouped
    multiplication, by a setting) and not this one. Run on fake tensors; what the other one does doesn't matter."""
    own = methods(module)
    source = read(own["forward"]) if "forward" in own else None
    readings = list(_readings(module))
    if source is None or len(source.required) != 2 or not readings:
        return False
    called: list[str] = []

    def noting(name: str) -> Callable[..., object]:
        def note(*args: object, **kwargs: object) -> object:
            called.append(name)
            return own[name](twin, *args, **kwargs)

        return note

    count = readings[0].count(module)
    for width in dict.fromkeys(reading.in_features for reading in readings):
        with isolated(), FakeTensorMode(allow_non_fake_inputs=True), suppress(Exception):
            twin = shadow(module)
            twin.__dict__.update({name: noting(name) for name in own if name not in ("forward", "__init__")})
            x = torch.empty(2 * count, width, dtype=readings[0].dtype(module), device=next(module.parameters()).device)
            twin(x, torch.full((count,), 2, device=x.device))
    return bool(called) and loop.name not in called


def _best(harness: Harness, loop: Loop, trial: Trial, readings: Sequence[PackedExperts]) -> PackedExperts | None:
    with isolated():
        twin = harness.copy()
        arguments = trial.entry.arguments(harness, 1, torch.float32)
        try:
            wanted = run(twin, trial.entry, arguments)
        except Exception:
            return None
        x, idx, w = (arguments[loop.source.required.index(name)] for name in trial.roles)
        errors = []
        for order, reading in enumerate(readings):
            routed = trial.candidate(loop, reading).rewrite.routed
            assert routed is not None
            errors.append((relative_error(routed(twin, x, idx, w), wanted), order))
    error, order = min(errors)
    return readings[order] if error < _TOLERANCE else None


def _readings(module: nn.Module) -> Iterator[PackedExperts]:
    """Every assignment of roles whose shapes fit."""
    names = list(packed_weights(module))
    if len(names) not in (2, 3):
        return
    shapes = {name: tuple(p.shape[1:]) for name, p in packed_weights(module).items()}
    for order, turned in product(permutations(names), product((False, True), repeat=len(names))):
        up, down, *gates = (PackedPart(name, shapes[name], t) for name, t in zip(order, turned, strict=True))
        (hidden, width), (out, inner) = up.sizes(module), down.sizes(module)
        for activation in ACTIVATIONS:
            if gates and gates[0].sizes(module) == (hidden, width) and inner == hidden:
                yield PackedExperts(up, down, gates[0], activation, width, out)
            elif not gates and inner == hidden:
                yield PackedExperts(up, down, None, activation, width, out)
            elif not gates and 2 * inner == hidden:
                for up_rows, gate_rows in halves(inner):
                    parts = (PackedPart(up.name, up.shape, up.transposed, rows) for rows in (up_rows, gate_rows))
                    yield PackedExperts(next(parts), down, next(parts), activation, width, out)


def _shapes(module: nn.Module) -> str:
    return ", ".join(f"{name} {tuple(p.shape)}" for name, p in packed_weights(module).items())
