"""A dispatch inside a larger method, often next to its router: only the loop statement is replaced.

The method is run with a note of its local tensors before and after the loop. The one that changed is the result; the
tokens, ids and weights are found among the others by value. Assignments that served only the loop (one-hot masks,
lists of hit experts, counts on the host) go with it; everything else stays as the author wrote it.
"""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeca_compile.expert_dispatch.families import collected, method
from moeca_compile.expert_dispatch.families.method import Layout
from moeca_compile.expert_dispatch.proof.attempt import Candidate, Entry, Harness, Rewrite, run
from moeca_compile.expert_dispatch.proof.entries import entries
from moeca_compile.expert_dispatch.proof.probe import close, isolated
from moeca_compile.expert_dispatch.proof.roles import roles
from moeca_compile.expert_dispatch.routed import NAME, Routed
from moeca_compile.expert_dispatch.source.loop import Loop, feeders
from moeca_compile.expert_dispatch.source.method_source import loads, rebuild, stores, suites

_BEFORE, _AFTER = "_moeca_before", "_moeca_after"


@dataclass
class _Locals:
    """Local tensors of one run, before and after the loop; a list entry each time that it was reached."""

    before: list[dict[str, Tensor]] = field(default_factory=list)
    after: list[dict[str, Tensor]] = field(default_factory=list)
    module: Any = None


def whole_or_loop(harness: Harness, loop: Loop, layouts: Sequence[Layout]) -> Candidate | str | None:
    """Rewrite the method as a whole where it is nothing but a dispatch, else only its loop."""
    whole = method.attempt(harness, loop, layouts) if method.fits(loop) else None
    if isinstance(whole, Candidate):
        return whole if reaches(harness, loop, whole.entry) else None
    part = attempt(harness, loop)
    return whole if isinstance(part, str) and whole is not None else part


def reaches(harness: Harness, loop: Loop, entry: Entry) -> bool:
    """Whether the loop itself runs in inference: the method may hold it for training and call another one."""
    return not loop.nest or bool(_observe(harness, loop, loop.nest[0], entry).before)


def attempt(harness: Harness, loop: Loop, ways: Iterable[Entry] | None = None) -> Candidate | str | None:
    """The rewritten method, why there is none, or None where inference doesn't reach the loop. `ways` to run it are
    found where they aren't given."""
    ways = entries(harness, loop) if ways is None else ways
    if loop.source.decorators:
        return f"{loop.name} is decorated with {', '.join(loop.source.decorators)}, which a rewritten one would lose"
    if not loop.nest:
        return collected.attempt(harness, loop, iter(ways))
    reason, reached = "", False
    for entry in ways:
        for statement in loop.nest:
            try:
                seen = _observe(harness, loop, statement, entry)
            except Exception as error:
                reason = reason or f"it can't be run on random tokens ({type(error).__name__}: {error})"
                break
            if not seen.before:
                continue
            reached = True
            found = _rewrite(harness, loop, statement, entry, seen)
            if isinstance(found, Candidate):
                return found
            reason = found
        else:
            if not reached:
                return None
            gathered = collected.attempt(harness, loop, iter([entry]))
            return gathered if isinstance(gathered, Candidate) else reason
    return reason or f"{loop.name} takes ({', '.join(loop.source.parameters[1:])}): no way to run it is known"


def _observe(harness: Harness, loop: Loop, statement: ast.stmt, entry: Entry) -> _Locals:
    seen = _Locals()

    def note(into: list[dict[str, Tensor]], scope: dict[str, object]) -> None:
        into.append({name: v.clone() for name, v in scope.items() if isinstance(v, Tensor)})

    hooks = {
        _BEFORE: lambda scope: note(seen.before, scope),
        _AFTER: lambda scope: note(seen.after, scope),
    }
    around = ast.parse(f"if True:\n {_BEFORE}(locals())\n pass\n {_AFTER}(locals())").body[0]
    assert isinstance(around, ast.If)
    around.body[1] = statement
    function = rebuild(loop.source, _replaced(loop.source.tree, {statement: around}), hooks)
    with isolated():
        seen.module = harness.copy()
        seen.module.__dict__[loop.name] = types.MethodType(function, seen.module)
        run(seen.module, entry, entry.arguments(harness, 1, torch.float32))
    return seen


def _rewrite(harness: Harness, loop: Loop, statement: ast.stmt, entry: Entry, seen: _Locals) -> Candidate | str:
    if len(seen.before) != 1 or len(seen.after) != 1:
        return "the loop runs more than once in a call"
    before, after = seen.before[0], seen.after[0]
    changed = [n for n, v in before.items() if n in after and v.is_floating_point() and not close(v, after[n])]
    if not changed:
        return "its result is not collected in a tensor that exists before the loop"
    feeding = feeders(loop.source.tree, statement)
    used = loads(statement).union(*(loads(s) for s in feeding))
    near = sorted((n for n in before if n in used), key=lambda n: (n not in loads(statement), n))
    if not any(True for _ in roles(harness, near, before)):
        return (
            f"no tensors before the loop that fills {', '.join(changed)} can be tokens, expert ids [T, K] and gate "
            "weights: experts that take a number of tokens read from the data (dynamic k) have no static form"
        )
    reason = f"what the loop leaves in {', '.join(changed)} is not the gate-weighted sum of each token's experts"
    for result in changed:  # several where one is a view of another
        for found in roles(harness, near, before):
            x, idx, w = found.x, found.idx, found.w
            extra = [before[name] for name in found.extra]
            accumulating = Routed(harness.experts, found.dense, found.per_sample, accumulate=True)
            with isolated():
                try:
                    sums = harness.routed(accumulating)(
                        seen.module, before[x], before[idx], before[w], before[result], *extra
                    )  # fmt: skip
                except (RuntimeError, ValueError):
                    continue
            if close(after[result], sums):
                fresh = _starts_at_zero(loop.source.tree, statement, result)
                routed = Routed(harness.experts, found.dense, found.per_sample, accumulate=not fresh)
                tree = _with_call(loop, statement, (x, idx, w, result, *found.extra))
                candidate = Candidate(Rewrite.of(loop, tree, routed), entry)
                problem = harness.disagreement(candidate)
                if not problem:
                    return candidate
                reason = problem
    return reason


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
    call = ast.parse(f"{result} = {NAME}({loop.source.self_name}, {', '.join(names)})").body[0]
    replaced: dict[ast.stmt, ast.stmt] = {statement: call}
    replaced.update((dead, ast.Pass()) for dead in _only_for(loop.source.tree, statement, set(names)))
    return _replaced(loop.source.tree, replaced)


def _only_for(tree: ast.FunctionDef, loop: ast.stmt, kept: set[str]) -> list[ast.Assign]:
    """Assignments to plain names that nothing but the loop, or another one of them, reads."""
    serving = [s for s in feeders(tree, loop) if all(isinstance(t, (ast.Name, ast.Tuple)) for t in s.targets)]
    while True:
        names = {name for s in serving for name in stores(s)}
        skipped = {*serving, loop}
        alive = kept | {n.id for n in _walk(tree, skipped) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        still = [s for s in serving if not stores(s) & alive]
        if len(still) == len(serving):
            return serving if names else []
        serving = still


def _walk(tree: ast.AST, skipped: set[Any]) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if child not in skipped:
            yield child
            yield from _walk(child, skipped)


def _replaced(tree: ast.FunctionDef, new: dict[ast.stmt, ast.stmt]) -> ast.FunctionDef:
    """A copy of `tree` with some statements exchanged; each new one gets the old one's lines."""
    for old, statement in new.items():
        ast.copy_location(statement, old)
        for node in _walk(statement, {old}):
            if isinstance(node, (ast.stmt, ast.expr)):
                ast.copy_location(node, old)
    return copy.deepcopy(tree, {id(old): statement for old, statement in new.items()})
