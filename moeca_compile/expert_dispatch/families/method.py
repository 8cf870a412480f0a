"""A dispatch that is a method of its own, `f(self, x, idx, w)`: its whole body becomes one canonical call.

Which argument is which, whether ids and weights come as [T, K] or flat, and which K the method assumes is found by
trying: the original is run on each layout, and the one that gives the gate-weighted sum is it.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import torch
from torch import Tensor

from moeca_compile.expert_dispatch.proof.attempt import (
    Arguments,
    Candidate,
    Entry,
    Harness,
    Rewrite,
    length,
    run,
    tokens_of,
)
from moeca_compile.expert_dispatch.proof.probe import isolated
from moeca_compile.expert_dispatch.routed import NAME, Experts, Routed
from moeca_compile.expert_dispatch.source.loop import Loop


@dataclass(frozen=True)
class Layout:
    """Shapes of the three arguments: `x` "TD" or "BTD", `idx` "TK" or "flat", `w` "TK", "flat", "column" or "TE"."""

    x: str
    idx: str
    w: str


PAIRED = (Layout("TD", "TK", "TK"), Layout("BTD", "TK", "TK"), Layout("TD", "TK", "TE"))
FLAT = (
    Layout("TD", "flat", "column"),
    Layout("TD", "flat", "flat"),
    Layout("TD", "flat", "TK"),
    Layout("TD", "TK", "column"),
)


def fits(loop: Loop) -> bool:
    """Whether the method takes three arguments and no more: tokens, ids and weights, it may be."""
    return loop.source.is_plain and len(loop.source.required) == 3


@dataclass(frozen=True)
class Trial:
    """One reading of the arguments: `roles` are the names of tokens, ids and weights."""

    roles: tuple[str, ...]
    layout: Layout
    entry: Entry

    def candidate(self, loop: Loop, experts: Experts) -> Candidate:
        routed = Routed(experts, dense=self.layout.w == "TE", dtype="x")
        return Candidate(Rewrite.of(loop, _call(loop, self.roles), routed), self.entry)


def trials(harness: Harness, loop: Loop, layouts: Sequence[Layout]) -> Iterator[Trial]:
    """Every reading of the method's three arguments, the likely ones first."""
    for roles, layout, top_k in product(permutations(loop.source.required), layouts, _possible_k(harness)):
        yield Trial(roles, layout, _entry(loop, roles, layout, top_k))


def attempt(harness: Harness, loop: Loop, layouts: Sequence[Layout]) -> Candidate | str:
    """The rewritten method, or why there is none."""
    reason = ""
    for trial in trials(harness, loop, layouts):
        candidate = trial.candidate(loop, harness.experts)
        problem = harness.disagreement(candidate)
        if not problem:
            return with_dtype(harness, candidate, trial)
        if not reason or reason.startswith(("the original", "no copy")):
            reason = problem
    return reason


def entries(harness: Harness, loop: Loop) -> Iterator[Entry]:
    """Ways to call a three-argument method directly."""
    if fits(loop):
        for layout, top_k in product(PAIRED + FLAT, _possible_k(harness)):
            yield _entry(loop, loop.source.required, layout, top_k)


def _possible_k(harness: Harness) -> list[int]:
    """K is often a setting of the module or its router. K = 1 and K = E say less: no order, no expert left out."""
    settings = {
        v
        for m in harness.module.modules()
        for v in vars(m).values()
        if type(v) is int and 1 <= v <= harness.num_experts
    }
    return sorted(settings | {1, 2}, key=lambda k: (k in (1, harness.num_experts), k not in settings, k))


def _call(loop: Loop, roles: tuple[str, ...]) -> ast.FunctionDef:
    """`return _moeca_routed(self, x, idx, w)` in place of the body."""
    line = ast.parse(f"return {NAME}({', '.join((loop.source.self_name, *roles))})").body
    tree = copy.copy(loop.source.tree)
    tree.body = [_located(statement, loop.nest[0] if loop.nest else loop.source.tree) for statement in line]
    return tree


def _located(statement: ast.stmt, place: ast.stmt) -> ast.stmt:
    for node in ast.walk(statement):
        if isinstance(node, (ast.stmt, ast.expr)):
            ast.copy_location(node, place)
    return statement


def _entry(loop: Loop, roles: tuple[str, ...], layout: Layout, top_k: int) -> Entry:
    order = [roles.index(name) for name in loop.source.required]

    def arguments(harness: Harness, seed: int, dtype: torch.dtype) -> Arguments:
        made = _arguments(harness, layout, top_k, seed, dtype)
        return tuple(made[i] for i in order)

    return Entry(loop.name, arguments)


def _arguments(harness: Harness, layout: Layout, top_k: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, idx, w; every expert is hit for odd seeds, as few as can be for even ones."""
    num_experts, batch = harness.num_experts, 2
    count = batch * length(seed, num_experts)
    x = tokens_of(seed, (count, harness.experts.in_features), harness.device, dtype)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(1 if seed % 2 == 0 else count, num_experts, generator=generator).expand(count, -1).clone()
        if seed % 2:
            scores[torch.arange(count), torch.arange(count) % num_experts] += 1.0
        idx = scores.topk(top_k, sorted=False).indices
        w = torch.rand(count, num_experts if layout.w == "TE" else top_k, generator=generator) + 0.1
    lead = (batch, count // batch) if layout.x == "BTD" else (count,)
    shapes = {"TK": (*lead, top_k), "flat": (-1,), "column": (-1, 1), "TE": (*lead, num_experts)}
    return (
        x.reshape(*lead, -1),
        idx.reshape(shapes[layout.idx]).to(harness.device),
        w.reshape(shapes[layout.w]).to(harness.device, dtype),
    )


def with_dtype(harness: Harness, candidate: Candidate, trial: Trial) -> Candidate:
    """Set whose dtype the result follows, from one run in which tokens, experts and weights have different ones."""
    follows = {torch.float32: "x", torch.bfloat16: "y", torch.float64: ""}
    rewrite, entry = candidate.rewrite, candidate.entry
    weights = rewrite.source.required.index(trial.roles[2])
    mixed = tuple(a.double() if i == weights else a for i, a in enumerate(entry.arguments(harness, 1, torch.float32)))
    with isolated():
        try:
            out = run(harness.copy(torch.bfloat16), entry, mixed)
        except Exception:
            return candidate  # it can't take such a mix; where all are alike the dtype of x is right
    rule = follows.get(out.dtype, "x") if isinstance(out, Tensor) else "x"
    assert rewrite.routed is not None
    return replace(candidate, rewrite=replace(rewrite, routed=replace(rewrite.routed, dtype=rule)))
