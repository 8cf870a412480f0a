"""A dispatch whose result is put together after the loop: outputs gathered in a list, a concatenation, an einsum.

The method is run with a note of every local tensor at the moment it is bound. A value made after the loop that equals
the gate-weighted sum for tokens, ids and weights made before it is the result; its statement becomes the canonical
call, the three values are kept where they are bound, and whatever is no longer read goes.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moeca_compile.expert_dispatch.proof.candidate import (
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
from moeca_compile.expert_dispatch.routed import NAME, Routed
from moeca_compile.expert_dispatch.source.loop import Loop
from moeca_compile.expert_dispatch.source.method_source import in_order, located, rebuild, replaced, stores, suites
from moeca_compile.expert_dispatch.source.prune import prune

_NOTE = "_moeca_note"
_LISTS = (ast.ListComp, ast.GeneratorExp)
_DTYPES = ("x", "", "y")  # whose dtype the result may have: all the same in float32, the module's own weights tell


@dataclass(frozen=True)
class _Value:
    """`name` as the statement of that index bound it; -1 is an argument."""

    index: int
    name: str
    tensor: Tensor = field(compare=False)


def decorated(loop: Loop) -> Unproven | None:
    """Why the method can't be rewritten in part: it has decorators."""
    if not loop.source.decorators:
        return None
    reason = f"{loop.name} is decorated with {', '.join(loop.source.decorators)}, which a rewritten one would lose"
    return Unproven(reason, Rank.SETTLED)


def one_result(harness: Harness, loop: Loop, entries: Iterable[Entry]) -> Iterator[Proposal]:
    """The method with the call in place of the statement that binds the gate-weighted sum, for each such statement.

    Args:
        harness: the module.
        loop: the loop behind which the result is put together, or a comprehension.
        entries: ways to run the method.

    Returns:
        Candidates, and reasons why there is none.
    """
    anchor = loop.nest[0] if loop.nest else _holder(loop)
    if anchor is None:
        yield Unproven("it is a comprehension inside a larger method", Rank.SETTLED)
        return
    tree, anchor = _with_named_result(loop.source.tree, anchor)
    for entry in entries:
        try:
            module, before, after = _observe(harness, loop, tree, anchor, entry)
        except Exception as error:  # whatever somebody's method can raise for arguments that aren't its own
            yield raised("it can't be run on random tokens", error)
            continue
        for target, choice in _matches(harness, module, before, after):
            parts = [before[role] for role in (choice.x, choice.idx, choice.w, *choice.extra)]
            rewritten = _with_call(loop, tree, target, parts)
            for dtype in _DTYPES:
                routed = Routed(harness.experts, choice.dense, choice.per_sample, dtype=dtype)
                yield Candidate(Rewrite.of(loop, rewritten, routed), entry, to_capture=True)
        yield Unproven(
            "no tensor that it makes is the gate-weighted sum of each token's experts",
            Rank.NO_PARTS if after else Rank.NO_ENTRY,
        )


def _holder(loop: Loop) -> ast.stmt | None:
    """The statement that a comprehension is in."""
    for statement in in_order(loop.source.tree):
        if hasattr(statement, "body"):
            continue
        nodes = list(ast.walk(statement))
        if any(getattr(n, "lineno", 0) == loop.line for n in nodes) and any(isinstance(n, _LISTS) for n in nodes):
            return statement
    return None


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
    inside: set[ast.stmt] = set()
    for statement in in_order(tree):
        if isinstance(statement, (ast.For, ast.While)):
            inside.update(in_order(statement))
    binding = [s for s in in_order(tree) if isinstance(s, (ast.Assign, ast.AugAssign, ast.Expr)) and s not in inside]
    return {s: i for i, s in enumerate(binding)}


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
        into = after if passed else before
        for name in names[index] if index >= 0 else tuple(scope):
            value = scope.get(name)
            if isinstance(value, Tensor):
                into.append(_Value(index, name, value.clone()))

    def mark(index: int) -> list[ast.stmt]:
        return ast.parse(f"{_NOTE}({index}, locals())").body

    def reached() -> None:
        passed.append(True)

    new = {s: [s, *mark(i)] for s, i in numbers.items()}
    new[anchor] = [*ast.parse(f"{_NOTE}_passed()").body, *new.get(anchor, [anchor])]
    clone = replaced(tree, new)
    clone.body[:0] = [located(s, clone.body[0]) for s in mark(-1)]
    function = rebuild(loop.source, clone, {_NOTE: note, f"{_NOTE}_passed": reached})
    return harness.observed(entry, loop.name, function), before, after


def _matches(
    harness: Harness, module: Any, before: list[_Value], after: list[_Value]
) -> Iterator[tuple[_Value, Roles[int]]]:
    """(result, roles as positions in `before`) that agree in value."""
    values = {i: value.tensor for i, value in enumerate(before)}
    for choice in roles(harness, list(values), values) if after else ():
        sums = _sums(harness, module, values, choice)
        if sums is None:
            continue
        for target in after:
            if target.tensor.shape == sums.shape and close(target.tensor.to(sums.dtype), sums):
                yield target, choice


def _sums(harness: Harness, module: Any, values: dict[int, Tensor], choice: Roles[int]) -> Tensor | None:
    """The gate-weighted sum that `choice` reads; None where the shapes don't fit."""
    routed = harness.routed(Routed(harness.experts, choice.dense, choice.per_sample))
    extra = [values[role] for role in choice.extra]
    with isolated():
        try:
            return routed(module, values[choice.x], values[choice.idx], values[choice.w], None, *extra)
        except (RuntimeError, ValueError, IndexError):
            return None


def _with_call(loop: Loop, tree: ast.FunctionDef, target: _Value, parts: list[_Value]) -> ast.FunctionDef:
    numbers = _noted(tree)
    statements = {i: s for s, i in numbers.items()}
    names = ["_moeca_x", "_moeca_idx", "_moeca_w", *(f"_moeca_extra{i}" for i in range(len(parts) - 3))]
    new: dict[ast.stmt, list[ast.stmt]] = {}
    first: list[ast.stmt] = []
    for local, part in zip(names, parts, strict=True):
        snapshot = ast.parse(f"{local} = {part.name}").body
        if part.index < 0:
            first.extend(snapshot)
        else:
            statement = statements[part.index]
            new.setdefault(statement, [statement]).extend(snapshot)
    passed = ", ".join([*names[:3], "None", *names[3:]] if names[3:] else names)
    new[statements[target.index]] = ast.parse(f"{target.name} = {NAME}({loop.source.self_name}, {passed})").body
    tree = replaced(tree, new)
    tree.body[:0] = [located(s, tree.body[0]) for s in first]
    return prune(tree)
