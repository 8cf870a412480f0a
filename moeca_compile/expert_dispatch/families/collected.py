"""A dispatch whose result is put together after the loop: outputs gathered in a list, a concatenation, an einsum.

The method is run with a note of every local tensor at the moment it is bound. A value made after the loop that equals
the gate-weighted sum for tokens, ids and weights made before it is the result; its statement becomes the canonical
call, the three values are kept where they are bound, and whatever is no longer read goes.
"""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeca_compile.expert_dispatch.proof.attempt import Candidate, Entry, Harness, Rewrite, run
from moeca_compile.expert_dispatch.proof.probe import close, isolated
from moeca_compile.expert_dispatch.proof.roles import Roles, roles
from moeca_compile.expert_dispatch.proof.traceable import blocker
from moeca_compile.expert_dispatch.routed import NAME, Routed
from moeca_compile.expert_dispatch.source.loop import Loop
from moeca_compile.expert_dispatch.source.method_source import in_order, rebuild, stores, suites
from moeca_compile.expert_dispatch.source.prune import prune

_NOTE = "_moeca_note"
_MISSING = "no tensor that it makes is the gate-weighted sum of each token's experts"


@dataclass(frozen=True)
class _Value:
    """`name` as the statement of that index bound it; -1 is an argument."""

    index: int
    name: str
    tensor: Tensor = field(compare=False)


def attempt(harness: Harness, loop: Loop, entries: Iterator[Entry]) -> Candidate | str:
    """The rewritten method, or why there is none. `entries` are ways to run it."""
    anchor = loop.nest[0] if loop.nest else _holder(loop)
    if anchor is None:
        return "it is a comprehension inside a larger method"
    tree, anchor = _with_named_result(loop.source.tree, anchor)
    reason = _MISSING
    for entry in entries:
        try:
            module, before, after = _observe(harness, loop, tree, anchor, entry)
        except Exception as error:
            if reason is _MISSING:
                reason = f"it can't be run on random tokens ({type(error).__name__}: {error})"
            continue
        if not after:
            continue
        for target, found in _matches(harness, module, before, after):
            for dtype in ("x", "", "y"):
                routed = Routed(harness.experts, found.dense, found.per_sample, dtype=dtype)
                changed = _with_call(
                    loop, tree, target, [before[role] for role in (found.x, found.idx, found.w, *found.extra)]
                )
                candidate = Candidate(Rewrite.of(loop, changed, routed), entry)
                problem = harness.disagreement(candidate) or harness.disagreement_on_own_weights(candidate, seeds=(1,))
                left = "" if problem else blocker(harness, loop.source, entry, candidate.rewrite)
                if not problem and not left:
                    return candidate
                reason = problem or f"without the dispatch, {left} still reads a size or a value out of a tensor"
    return reason


def _holder(loop: Loop) -> ast.stmt | None:
    """The statement that a comprehension is in."""
    simple = (s for s in in_order(loop.source.tree) if not hasattr(s, "body"))
    inside = (s for s in simple if any(getattr(n, "lineno", 0) == loop.line for n in ast.walk(s)))
    return next((s for s in inside if any(isinstance(n, (ast.ListComp, ast.GeneratorExp)) for n in ast.walk(s))), None)


def _with_named_result(tree: ast.FunctionDef, anchor: ast.stmt) -> tuple[ast.FunctionDef, ast.stmt]:
    """A copy of `tree` in which `return f(y)` is `result = f(y); return result`, and the anchor in it."""
    memo: dict[int, Any] = {}
    clone: ast.FunctionDef = copy.deepcopy(tree, memo)
    for block in list(suites(clone)):
        for statement in list(block):
            if isinstance(statement, ast.Return) and statement.value is not None and statement is not memo[id(anchor)]:
                named = ast.copy_location(
                    ast.Assign([ast.Name("_moeca_result", ast.Store())], statement.value), statement
                )
                block.insert(block.index(statement), named)
                statement.value = ast.Name("_moeca_result", ast.Load())
    return ast.fix_missing_locations(clone), memo[id(anchor)]


def _noted(tree: ast.FunctionDef) -> dict[ast.stmt, int]:
    """The assignments whose values are noted: those outside of loops."""
    inside = {s for outer in in_order(tree) if isinstance(outer, (ast.For, ast.While)) for s in in_order(outer)}
    plain = (s for s in in_order(tree) if isinstance(s, (ast.Assign, ast.AugAssign, ast.Expr)) and s not in inside)
    return {s: i for i, s in enumerate(plain)}


def _observe(
    harness: Harness, loop: Loop, tree: ast.FunctionDef, anchor: ast.stmt, entry: Entry
) -> tuple[Any, list[_Value], list[_Value]]:
    """The module it ran in, values bound before the loop, and values bound after it."""
    before: list[_Value] = []
    after: list[_Value] = []
    passed: list[bool] = []
    numbers = _noted(tree)
    names = {i: tuple(sorted(stores(s))) for s, i in numbers.items()}

    def note(index: int, scope: dict[str, object]) -> None:
        wanted = names[index] if index >= 0 else tuple(scope)
        into = after if passed else before
        into.extend(_Value(index, n, v.clone()) for n in wanted if isinstance(v := scope.get(n), Tensor))

    def mark(index: int) -> list[ast.stmt]:
        return ast.parse(f"{_NOTE}({index}, locals())").body

    def reached() -> None:
        passed.append(True)

    notes = {s: mark(i) for s, i in numbers.items()}
    clone = _edited(tree, notes, {anchor: [*ast.parse(f"{_NOTE}_passed()").body, anchor]})
    clone.body[:0] = [ast.copy_location(s, clone.body[0]) for s in mark(-1)]
    ast.fix_missing_locations(clone)
    function = rebuild(loop.source, clone, {_NOTE: note, f"{_NOTE}_passed": reached})
    with isolated():
        module = harness.copy()
        module.__dict__[loop.name] = types.MethodType(function, module)
        run(module, entry, entry.arguments(harness, 1, torch.float32))
    return module, before, after


def _edited(
    tree: ast.FunctionDef, behind: dict[ast.stmt, list[ast.stmt]], instead: dict[ast.stmt, list[ast.stmt]]
) -> ast.FunctionDef:
    """A copy of `tree` with statements put behind some of its own, and others in the place of some."""
    memo: dict[int, Any] = {}
    clone: ast.FunctionDef = copy.deepcopy(tree, memo)
    for block in list(suites(clone)):
        for statement in list(block):
            old = next((s for s in (*behind, *instead) if memo[id(s)] is statement), None)
            if old is not None:
                at = block.index(statement)
                own = [memo.get(id(s), s) for s in instead.get(old, [old])]
                block[at : at + 1] = [ast.copy_location(s, statement) for s in (*own, *behind.get(old, ()))]
    return clone


def _matches(
    harness: Harness, module: Any, before: list[_Value], after: list[_Value]
) -> Iterator[tuple[_Value, Roles[int]]]:
    """(result, roles as positions in `before`) that agree in value."""
    values = {i: value.tensor for i, value in enumerate(before)}
    for found in roles(harness, list(values), values):
        routed = harness.routed(Routed(harness.experts, found.dense, found.per_sample, dtype=""))
        with isolated():
            try:
                extra = (values[role] for role in found.extra)
                sums = routed(module, values[found.x], values[found.idx], values[found.w], None, *extra)
            except (RuntimeError, ValueError, IndexError):
                continue
        for target in after:
            if target.tensor.shape == sums.shape and close(target.tensor.to(sums.dtype), sums):
                yield target, found


def _with_call(loop: Loop, tree: ast.FunctionDef, target: _Value, parts: list[_Value]) -> ast.FunctionDef:
    numbers = _noted(tree)
    statements = {i: s for s, i in numbers.items()}
    kept = ["_moeca_x", "_moeca_idx", "_moeca_w", *(f"_moeca_extra{i}" for i in range(len(parts) - 3))]
    snapshots: dict[ast.stmt, list[ast.stmt]] = {}
    first: list[ast.stmt] = []
    for local, part in zip(kept, parts, strict=True):
        bound = ast.parse(f"{local} = {part.name}").body
        if part.index < 0:
            first.extend(bound)
        else:
            snapshots.setdefault(statements[part.index], []).extend(bound)
    result = statements[target.index]
    given = ", ".join([*kept[:3], "None", *kept[3:]] if kept[3:] else kept)
    call = ast.parse(f"{target.name} = {NAME}({loop.source.self_name}, {given})").body
    tree = _edited(tree, snapshots, {result: call})
    tree.body[:0] = [ast.copy_location(s, tree.body[0]) for s in first]
    return prune(ast.fix_missing_locations(tree))
