"""Experts whose body is not a (gated) MLP: norms or scales inside, three layers, another function for each expert.

`moeca::experts` can't hold such a body, and segments of unknown length can't be captured: sizes in our graphs are
numbers. So every expert module runs on every token and the routing picks what it chose. That is exact, has no host
sync, and costs E/K times the routed MACs, which the report says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeca_compile.canonical.experts import members, walk
from moeca_compile.canonical.probe import (
    compute_device,
    differing_state,
    isolated,
    random_parameters,
    relative_error,
    shadow,
)

_PROBE_TOKENS = 5
_TOLERANCE = 1e-4  # float32, relative


@dataclass(frozen=True, slots=True)
class AnyExperts:
    """Experts of one input and one output width in the container at `stack`; what they compute isn't known."""

    stack: tuple[str, ...]
    in_features: int
    out_features: int

    @property
    def activation(self) -> str:
        return "any"

    @property
    def gated(self) -> bool:
        return False

    @property
    def exhaustive(self) -> bool:
        return True

    def branches(self, owner: nn.Module, tokens: Tensor, ids: Tensor) -> Tensor:
        """y[t,k] = expert_{ids[t,k]}(x_t), from E runs on all tokens; an expert's inf stays with those who chose it."""
        y: Tensor | None = None
        for e, expert in enumerate(members(owner, self.stack)):
            out = expert(tokens).unsqueeze(1)
            y = out.expand(*ids.shape, -1) if y is None else torch.where((ids == e).unsqueeze(-1), out, y)
        assert y is not None
        return y

    def dtype(self, owner: nn.Module) -> torch.dtype:
        expert = members(owner, self.stack)[0]
        return next((p.dtype for p in expert.parameters() if p.is_floating_point()), torch.float32)

    def count(self, owner: nn.Module) -> int:
        return len(walk(owner, self.stack)._modules)


def recognise(stack: tuple[str, ...], experts: Sequence[nn.Module]) -> AnyExperts | str:
    """Experts that map each token by itself, deterministically, [n, D] to [n, D_out]; or what speaks against it."""
    widths: tuple[int, int] | None = None
    for e, expert in enumerate(experts):
        found = _widths(expert)
        if isinstance(found, str):
            return f"expert {e} {found}"
        if widths is not None and found != widths:
            return f"experts 0 and {e} map {widths[0]} to {widths[1]} and {found[0]} to {found[1]} features"
        widths = found
    assert widths is not None
    return AnyExperts(stack, *widths)


def _widths(expert: nn.Module) -> tuple[int, int] | str:
    device = compute_device(expert)
    sizes = dict.fromkeys(p.shape[-1] for p in expert.parameters() if p.dim())
    problem = "has no parameters"
    with isolated():
        for width in sizes:
            try:
                twin = shadow(expert, random_parameters(expert, device))
                x = 3.0 * torch.randn(_PROBE_TOKENS, width, device=device, dtype=torch.float32)
                y = twin(x.clone())
                again = torch.cat([twin(row.clone()) for row in x.split(1)])
            except Exception as error:
                problem = f"can't be run on tokens [n, D] ({type(error).__name__}: {error})"
                continue
            if not isinstance(y, Tensor) or y.dim() != 2 or y.shape[0] != len(x):
                return "doesn't map tokens [n, D] to [n, D_out]"
            changed = differing_state(shadow(expert), twin)
            if changed:
                return f"changes its own state ({changed}) while it runs"
            if relative_error(again, y) > _TOLERANCE:
                return "mixes tokens, or doesn't give the same twice"
            return width, y.shape[1]
    return problem
