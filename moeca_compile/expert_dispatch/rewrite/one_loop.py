"""A dispatch inside a larger method, often next to its router: only the loop statement is replaced.

The method is run with a note of its local tensors before and after the loop. The one that changed is the result; the
tokens, ids and weights are found among the others by value. Assignments that served only the loop (one-hot masks,
lists of hit experts, counts on the host) go with it; everything else stays as the author wrote it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

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
from moeca_compile.expert_dispatch.proof.harness import Harness
from moeca_compile.expert_dispatch.proof.probe import close, isolated
from moeca_compile.expert_dispatch.proof.roles import Roles, roles
from moeca_compile.expert_dispatch.rewrite.one_result import decorated, one_result
from moeca_compile.expert_dispatch.routed import NAME, Routed
from moeca_compile.expert_dispatch.source.loop import Loop, feeders
from moeca_compile.expert_dispatch.source.method_source import loads, rebuild, replaced, stores, suites

_BEFORE, _AFTER = "_moeca_before", "_moeca_after"


@dataclass
class _Locals:
    """Local tensors of one run, before and after the loop; a list entry each time that it was reached."""

    before: list[dict[str, Tensor]] = field(default_factory=list)
    after: list[dict[str, Tensor]] = field(default_factory=list)
    module: Any = None


def reaches(harness: Harness, loop: Loop, entry: Entry) -> bool:
    """Whether the loop itself runs in inference: the method may hold it for training and call another one."""
    return not loop.nest or bool(_observe(harness, loop, loop.nest[0], entry).before)


def one_loop(harness: Harness, loop: Loop, entries: Iterable[Entry]) -> Iterator[Proposal]:
    """The method with its loop replaced, and where that can't be, with what is made of the loop's results replaced.

    Args:
        harness: the module.
        loop: the loop; the inner loops of its nest are tried too.
        entries: ways to run the method. The first under which it runs decides.

    Returns:
        Candidates, and reasons why there is none.
    """
    problem = decorated(loop)
    if problem is not None:
        yield problem
        return
    if not loop.nest:
        yield from one_result(harness, loop, entries)
        return
    for entry in entries:
        try:
            observed = [(statement, _observe(harness, loop, statement, entry)) for statement in loop.nest]
        except Exception as error:  # whatever somebody's method can raise for arguments that aren't its own
            yield raised("it can't be run on random tokens", error)
            continue
        reached = [(statement, values) for statement, values in observed if values.before]
        if not reached:
            yield NOT_NEEDED
            return
        for statement, values in reached:
            yield from _in_place_of(harness, loop, statement, entry, values)
        yield from one_result(harness, loop, [entry])
        return
    parameters = ", ".join(loop.source.parameters[1:])
    yield Unproven(f"{loop.name} takes ({parameters}): no way to run it is known", Rank.NO_ENTRY)


def _observe(harness: Harness, loop: Loop, statement: ast.stmt, entry: Entry) -> _Locals:
    values = _Locals()

    def note(into: list[dict[str, Tensor]], scope: dict[str, object]) -> None:
        into.append({name: v.clone() for name, v in scope.items() if isinstance(v, Tensor)})

    hooks = {
        _BEFORE: lambda scope: note(values.before, scope),
        _AFTER: lambda scope: note(values.after, scope),
    }
    marks = ast.parse(f"{_BEFORE}(locals())\n{_AFTER}(locals())").body
    tree = replaced(loop.source.tree, {statement: [marks[0], statement, marks[1]]})
    values.module = harness.observed(entry, loop.name, rebuild(loop.source, tree, hooks))
    return values


def _in_place_of(
    harness: Harness, loop: Loop, statement: ast.stmt, entry: Entry, values: _Locals
) -> Iterator[Proposal]:
    """The call in place of `statement`, for each choice of tokens, ids and weights that leaves the same tensors."""
    if len(values.before) != 1 or len(values.after) != 1:
        yield Unproven("the loop runs more than once in a call", Rank.NO_PARTS)
        return
    before, after = values.before[0], values.after[0]
    changed = [n for n, v in before.items() if n in after and v.is_floating_point() and not close(v, after[n])]
    if not changed:
        yield Unproven("its result is not collected in a tensor that exists before the loop", Rank.NO_PARTS)
        return
    read_by_loop = loads(statement)
    used = read_by_loop.union(*(loads(feeder) for feeder in feeders(loop.source.tree, statement)))
    near = sorted((n for n in before if n in used), key=lambda n: (n not in read_by_loop, n))
    choices = list(roles(harness, near, before))
    filled = ", ".join(changed)
    if not choices:
        reason = (
            f"no tensors before the loop that fills {filled} can be tokens, expert ids [T, K] and gate weights: "
            "experts that take a number of tokens read from the data (dynamic k) have no static form"
        )
        yield Unproven(reason, Rank.NO_PARTS)
        return
    for result in changed:  # several where one is a view of another
        for choice in choices:
            sums = _added(harness, values.module, before, result, choice)
            if sums is not None and close(after[result], sums):
                fresh = _starts_at_zero(loop.source.tree, statement, result)
                routed = Routed(harness.experts, choice.dense, choice.per_sample, accumulate=not fresh)
                tree = _with_call(loop, statement, (choice.x, choice.idx, choice.w, result, *choice.extra))
                yield Candidate(Rewrite.of(loop, tree, routed), entry)
    reason = f"what the loop leaves in {filled} is not the gate-weighted sum of each token's experts"
    yield Unproven(reason, Rank.DIFFERENT)


def _added(harness: Harness, module: Any, before: dict[str, Tensor], result: str, choice: Roles[str]) -> Tensor | None:
    """What `result` holds once the sum that `choice` reads is added to it; None where the shapes don't fit."""
    routed = harness.routed(Routed(harness.experts, choice.dense, choice.per_sample, accumulate=True))
    extra = [before[name] for name in choice.extra]
    with isolated():
        try:
            return routed(module, before[choice.x], before[choice.idx], before[choice.w], before[result], *extra)
        except (RuntimeError, ValueError):
            return None


def _starts_at_zero(tree: ast.FunctionDef, loop: ast.stmt, name: str) -> bool:
    """Whether `name` is made by zeros() right before the loop, in the same block."""
    block = next(suite for suite in suites(tree) if loop in suite)
    for statement in reversed(block[: block.index(loop)]):
        if name in stores(statement) | loads(statement):
            value = statement.value if isinstance(statement, ast.Assign) and name in stores(statement) else None
            called = value.func if isinstance(value, ast.Call) else None
            return getattr(called, "attr", getattr(called, "id", "")) in ("zeros", "zeros_like", "new_zeros")
    return False


def _with_call(loop: Loop, statement: ast.stmt, names: tuple[str, ...]) -> ast.FunctionDef:
    """`result = _moeca_routed(self, x, idx, w, result)` in place of the loop, and nothing that only the loop used."""
    result = names[3]
    call = ast.parse(f"{result} = {NAME}({loop.source.self_name}, {', '.join(names)})").body
    dead = _only_for(loop.source.tree, statement, set(names))
    return replaced(loop.source.tree, {statement: call, **{s: [ast.Pass()] for s in dead}})


def _only_for(tree: ast.FunctionDef, loop: ast.stmt, read_by_call: set[str]) -> list[ast.Assign]:
    """Assignments to plain names that nothing but the loop, or another one of them, reads."""
    serving = [s for s in feeders(tree, loop) if all(isinstance(t, (ast.Name, ast.Tuple)) for t in s.targets)]
    while True:
        skipped = {*serving, loop}
        names = [node for node in _walk(tree, skipped) if isinstance(node, ast.Name)]
        alive = read_by_call | {node.id for node in names if isinstance(node.ctx, ast.Load)}
        remaining = [s for s in serving if stores(s) and not stores(s) & alive]
        if len(remaining) == len(serving):
            return serving
        serving = remaining


def _walk(tree: ast.AST, skipped: set[Any]) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if child not in skipped:
            yield child
            yield from _walk(child, skipped)
