"""Experts whose body is not a (gated) MLP: norms or scales inside, three layers, another function for each expert, a
second value for each token (time-aware experts).

`moeca::experts` can't hold such a body, and segments of unknown length can't be captured: sizes in our graphs are
numbers. So every expert module runs on every token and the routing picks what it chose. That is exact, has no host
sync, and costs E/K times the routed MACs, which the report says.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch.proof.anatomy import CHANGED, SAME, Anatomy, anatomy_of, compare, compute_dtype
from moeca_compile.expert_dispatch.proof.experts import RANKS, ModuleExperts, members, run_expert, walk
from moeca_compile.expert_dispatch.proof.probe import (
    compute_device,
    differing_state,
    isolated,
    random_parameters,
    relative_error,
    shadow,
)

_MOST_EXTRA = 2
_PROBE_TOKENS = 5
_TOLERANCE = 1e-4  # float32, relative


@dataclass(frozen=True, slots=True)
class AnyExperts:
    """Experts of one input and one output width in the container at `stack`; what they compute isn't known.

    `extra`: the widths of what else they take for each token. `rank`: of the tokens that their forward takes.
    `anatomies` are those of the experts, or one that all have."""

    stack: tuple[str, ...]
    in_features: int
    out_features: int
    extra: tuple[int, ...] = ()
    rank: int = 2
    anatomies: tuple[Anatomy, ...] = ()

    @property
    def activation(self) -> str:
        return "any"

    @property
    def gated(self) -> bool:
        return False

    @property
    def exhaustive(self) -> bool:
        return True

    def condition(self, owner: nn.Module) -> int:
        """Adapters need no other form: each expert's own forward runs already."""
        experts, anatomies = members(owner, self.stack), self.anatomies
        if len(anatomies) not in (1, len(experts)):
            return CHANGED
        for e, expert in enumerate(experts):
            if compare(expert, anatomies[e % len(anatomies)]) == CHANGED:
                return CHANGED
        return SAME

    def branches(self, owner: nn.Module, tokens: Tensor, ids: Tensor, *extra: Tensor) -> Tensor:
        """y[t,k] = expert_{ids[t,k]}(x_t), from E runs on all tokens; an expert's inf stays with those who chose it."""
        y: Tensor | None = None
        for e, expert in enumerate(members(owner, self.stack)):
            out: Tensor = run_expert(expert, self.rank, tokens, *extra).unsqueeze(1)
            y = out.expand(*ids.shape, -1) if y is None else torch.where((ids == e).unsqueeze(-1), out, y)
        assert y is not None
        return y

    def dtype(self, owner: nn.Module) -> torch.dtype:
        return compute_dtype(members(owner, self.stack)[0], owner)

    def count(self, owner: nn.Module) -> int:
        return len(walk(owner, self.stack)._modules)


def recognize(stack: tuple[str, ...], experts: Sequence[nn.Module]) -> AnyExperts | str:
    """Experts that map each token by itself, deterministically, [n, D] to [n, D_out]; or what speaks against it."""
    first: AnyExperts | None = None
    for e, expert in enumerate(experts):
        form = _form(stack, expert)
        if isinstance(form, str):
            return f"expert {e} {form}"
        first = first or form
        if form != first:
            sizes, others = ((x.in_features, *x.extra, x.out_features) for x in (first, form))
            return f"experts 0 and {e} map {sizes[:-1]} to {sizes[-1]} and {others[:-1]} to {others[-1]} features"
    assert first is not None
    return replace(first, anatomies=tuple(map(anatomy_of, experts)))


def following(experts: ModuleExperts) -> AnyExperts:
    """The form in which experts run by their own forward, adapters and quantized weights included."""
    body = experts.body
    return AnyExperts(experts.stack, body.in_features, body.out_features, rank=body.rank, anatomies=(body.anatomy,))


def _form(stack: tuple[str, ...], expert: nn.Module) -> AnyExperts | str:
    """How one expert is called and what it gives, or why it isn't taken."""
    device = compute_device(expert)
    sizes = tuple(dict.fromkeys(p.shape[-1] for p in expert.parameters() if p.dim()))
    problem = "has no parameters" if not sizes else ""
    more = _more_arguments(expert)
    if more > _MOST_EXTRA:
        return f"takes {more + 1} arguments: the tokens and up to {_MOST_EXTRA} more values a token are known"
    with isolated():
        for rank, (width, *extra) in product(RANKS, product(sizes, repeat=1 + more)):
            try:
                twin = shadow(expert, random_parameters(expert, device))
                rows = [
                    torch.randn(_PROBE_TOKENS, size, device=device, dtype=torch.float32) for size in (width, *extra)
                ]
                rows[0] *= 3.0
                y = run_expert(twin, rank, *(row.clone() for row in rows))
                parts = zip(*(row.split(1) for row in rows), strict=True)
                again = torch.cat([run_expert(twin, rank, *(row.clone() for row in part)) for part in parts])
            except Exception as error:
                problem = problem or f"can't be run on tokens [n, D] ({type(error).__name__}: {error})"
                continue
            if not isinstance(y, Tensor) or y.dim() != 2 or y.shape[0] != _PROBE_TOKENS:
                return "doesn't map tokens [n, D] to [n, D_out]"
            changed = differing_state(shadow(expert), twin)
            if changed:
                return f"changes its own state ({changed}) while it runs"
            if relative_error(again, y) > _TOLERANCE:
                return "mixes tokens, or doesn't give the same twice"
            return AnyExperts(stack, width, y.shape[1], tuple(extra), rank)
    return problem


def _more_arguments(expert: nn.Module) -> int:
    """How many arguments without a default its forward takes beside the tokens."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(expert.forward).parameters.values()
    return max(0, sum(p.kind in kinds and p.default is p.empty for p in parameters) - 1)
