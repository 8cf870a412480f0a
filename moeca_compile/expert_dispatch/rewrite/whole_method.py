"""A dispatch that is a method of its own, `f(self, x, idx, w)`: its whole body becomes one canonical call.

Which argument is which, whether ids and weights come as [T, K] or flat, and which K the method assumes is found by
trying: the original is run on each layout, and the one that gives the gate-weighted sum is it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moeca_compile.expert_dispatch.proof.candidate import (
    NOT_NEEDED,
    Candidate,
    Entry,
    Proposal,
    Rank,
    Rewrite,
    Unproven,
    raised,
)
from moeca_compile.expert_dispatch.proof.harness import Harness, run
from moeca_compile.expert_dispatch.proof.layouts import Layout, entry_of, possible_k, takes_three
from moeca_compile.expert_dispatch.proof.packed_experts import PackedHarness, shapes_of, weights_problem
from moeca_compile.expert_dispatch.proof.probe import isolated, relative_error, shadow
from moeca_compile.expert_dispatch.rewrite.one_loop import reaches
from moeca_compile.expert_dispatch.routed import NAME, Experts, Routed
from moeca_compile.expert_dispatch.source.loop import Loop
from moeca_compile.expert_dispatch.source.method_source import methods_of, read

_TOLERANCE = 1e-4  # float32, relative; the best reading wins


@dataclass(frozen=True)
class _Trial:
    """One reading of the arguments: `roles` are the names of tokens, ids and weights."""

    roles: tuple[str, ...]
    layout: Layout
    entry: Entry

    def candidate(self, loop: Loop, experts: Experts) -> Candidate:
        routed = Routed(experts, dense=self.layout.w == "TE", dtype="x")
        code = f"return {NAME}({', '.join((loop.source.self_name, *self.roles))})"
        return Candidate(Rewrite.with_body(loop, code, routed), self.entry)


def whole_method(harness: Harness, loop: Loop, layouts: Sequence[Layout]) -> Iterator[Proposal]:
    """The method of `loop` as one call, for each reading of its three arguments that gives what the original gives.

    Args:
        harness: the module; where its experts are stacked parameters, each reading of these is tried too.
        loop: a method that takes tokens, ids and weights; any other gives no candidate.
        layouts: the shapes to try, the likely ones first.

    Returns:
        Candidates, and reasons why there is none.
    """
    if not takes_three(loop):
        return
    by_width: dict[int, list[Experts]] = {}
    for reading in harness.readings:
        by_width.setdefault(reading.in_features, []).append(reading)
    for readings in by_width.values():
        held = harness.holding(readings[0])
        for trial in _trials(held, loop, layouts):
            best = _best(held, loop, trial, readings)
            if isinstance(best, Unproven):
                yield best
            elif not reaches(held, loop, trial.entry):
                yield NOT_NEEDED
                return
            else:
                yield _with_dtype(held, trial.candidate(loop, best), trial)


def packed_method(harness: PackedHarness, loop: Loop, layouts: Sequence[Layout]) -> Iterator[Proposal]:
    """`whole_method` for experts that are stacked parameters, which only a method as a whole tells the roles of."""
    module = harness.module
    if not takes_three(loop):
        if _passed_over(harness, loop):
            yield NOT_NEEDED
            return
        parameters = ", ".join(loop.source.parameters[1:])
        reason = f"{loop.name} takes ({parameters}), not just tokens, ids and gate weights, each required"
        yield Unproven(reason, Rank.SETTLED)
        return
    problem = weights_problem(module)
    if problem:
        yield Unproven(problem, Rank.SETTLED)
        return
    for proposal in whole_method(harness, loop, layouts):
        if isinstance(proposal, Candidate) or proposal is NOT_NEEDED:
            yield proposal
    yield Unproven(f"it is not the gate-weighted sum of (gated) MLPs read from {shapes_of(module)}", Rank.NOT_RUN)


def _trials(harness: Harness, loop: Loop, layouts: Sequence[Layout]) -> Iterator[_Trial]:
    """Every reading of the method's three arguments, the likely ones first: orders, shapes and K don't depend on each
    other, and no name or annotation tells any of them."""
    for roles in permutations(loop.source.required):
        for layout in layouts:
            for top_k in possible_k(harness):
                yield _Trial(roles, layout, entry_of(loop, roles, layout, top_k))


def _best(harness: Harness, loop: Loop, trial: _Trial, readings: Sequence[Experts]) -> Experts | Unproven:
    """The reading of the experts that comes nearest to what the original gives, or why none gives the same."""
    with isolated():
        twin = harness.copy()
        arguments = trial.entry.arguments(harness, 1, torch.float32)
        try:
            expected = run(twin, trial.entry, arguments)
        except Exception as error:  # whatever somebody's method can raise for arguments that aren't its own
            return raised("the original can't be run on random tokens", error)
        x, idx, w = (arguments[loop.source.required.index(name)] for name in trial.roles)
        errors = []
        for order, reading in enumerate(readings):
            routed = trial.candidate(loop, reading).rewrite.routed
            assert routed is not None
            errors.append((relative_error(harness.routed(routed)(twin, x, idx, w), expected), order))
    smallest, order = min(errors)
    if smallest < _TOLERANCE:
        return readings[order]
    return Unproven("its result is not the gate-weighted sum of each token's experts", Rank.DIFFERENT)


def _passed_over(harness: PackedHarness, loop: Loop) -> bool:
    """Whether `forward(x, counts)`, for tokens sorted by expert, calls another of the module's methods (a grouped
    multiplication, by a setting) and not this one. Run on fake tensors; what the other one does doesn't matter."""
    module = harness.module
    methods = methods_of(type(module))
    source = read(methods["forward"]) if "forward" in methods else None
    if source is None or len(source.required) != 2:
        return False
    called: list[str] = []

    def noting(name: str) -> Callable[..., object]:
        def note(*args: object, **kwargs: object) -> object:
            called.append(name)
            return methods[name](twin, *args, **kwargs)

        return note

    count = harness.num_experts
    for width in dict.fromkeys(reading.in_features for reading in harness.readings):
        with isolated(), FakeTensorMode(allow_non_fake_inputs=True):
            try:
                twin = shadow(module)
                twin.__dict__.update({name: noting(name) for name in methods if name not in ("forward", "__init__")})
                device = next(module.parameters()).device
                x = torch.empty(2 * count, width, dtype=harness.experts.dtype(module), device=device)
                twin(x, torch.full((count,), 2, device=x.device))
            except Exception as error:  # what was called until then is what is asked for
                raised(f"{loop.name} was looked for in a run on fake tensors, which stopped", error)
    return bool(called) and loop.name not in called


def _with_dtype(harness: Harness, candidate: Candidate, trial: _Trial) -> Candidate:
    """Set whose dtype the result follows, from one run in which tokens, experts and weights have different ones."""
    follows = {torch.float32: "x", torch.bfloat16: "y", torch.float64: ""}
    rewrite, entry = candidate.rewrite, candidate.entry
    weights = rewrite.source.required.index(trial.roles[2])
    mixed = tuple(a.double() if i == weights else a for i, a in enumerate(entry.arguments(harness, 1, torch.float32)))
    with isolated():
        try:
            out = run(harness.copy(torch.bfloat16), entry, mixed)
        except Exception as error:  # it can't take such a mix; where all are alike the dtype of x is right
            raised("the original can't be run on tokens and weights of different dtypes", error)
            return candidate
    rule = follows.get(out.dtype, "x") if isinstance(out, Tensor) else "x"
    assert rewrite.routed is not None
    return replace(candidate, rewrite=replace(rewrite, routed=replace(rewrite.routed, dtype=rule)))
