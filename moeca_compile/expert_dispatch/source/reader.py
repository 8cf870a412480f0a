"""Reads one method for expert loops.

Two structural facts tell such a loop from a loop over layers: the experts run side by side (no expert's output is
another's input), and which rows each one gets is read out of a tensor (`evidence`). A loop without evidence (all
experts on all tokens, static slices) can be traced as it is.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Collection, Iterator, Mapping

from moeca_compile.expert_dispatch.source.loop import MASKED, SORTED, Loop, feeders, written
from moeca_compile.expert_dispatch.source.method_source import Source, loads, read, stores, suites

Path = tuple[str, ...]
_CALLS = (SORTED | MASKED) - {"where", "mask", "if any"}  # evidence by the name of what is called
_MASKS = {"one_hot", "bool", "eq", "isin", "logical_and"}
_TESTS = {"any", "numel", "sum", "count_nonzero", "max"}  # evidence where an `if` asks for it


class Reader:
    """Reads one method."""

    def __init__(
        self,
        methods: Mapping[str, types.FunctionType],
        name: str,
        source: Source,
        stacks: Collection[Path],
        packed: Collection[Path],
    ) -> None:
        """`methods` are all of the class; `stacks` the paths of expert containers, `packed` of packed weights."""
        self.methods, self.name, self.source, self.stacks, self.packed = methods, name, source, stacks, packed
        self.parents = {child: node for node in ast.walk(source.tree) for child in ast.iter_child_nodes(node)}
        self.stack_names: dict[str, Path] = {}
        self.member_names: dict[str, Path] = {}
        self._bind()

    def loops(self) -> Iterator[Loop]:
        finished: set[ast.AST] = set()
        for use in ast.walk(self.source.tree):
            stack = self._used(use)
            if stack is None:
                continue
            around = list(self._around(use))
            nest = tuple(n for n in reversed(around) if isinstance(n, (ast.For, ast.While)))
            comprehensions = (n for n in around if isinstance(n, (ast.ListComp, ast.GeneratorExp)))
            repeated: ast.stmt | ast.expr | None = nest[0] if nest else next(comprehensions, None)
            if repeated is None or repeated in finished:
                continue
            if nest and isinstance(use, ast.Call) and self._is_sequential(nest[-1], use):
                continue
            finished.add(repeated)
            evidence = self._evidence(repeated)
            if evidence:
                packed = stack in self.packed
                yield Loop(self.name, self.source, stack, nest, repeated.lineno, evidence, packed)

    def _used(self, node: ast.AST) -> Path | None:
        """The stack of which `node` calls a member, or takes one expert's packed weight."""
        if isinstance(node, ast.Call):
            return self._member(node.func)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            path = self._path(node.value)
            return path if path in self.packed else None
        return None

    def _bind(self) -> None:
        """Local names of stacks (`experts = self.experts`) and of their members (`expert = experts[i]`)."""
        for node in ast.walk(self.source.tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                stack = self._stack(node.value)
                if stack is not None:
                    self.stack_names[node.targets[0].id] = stack
        for node in ast.walk(self.source.tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                stack = self._member(node.value)
                if stack is not None:
                    self.member_names[node.targets[0].id] = stack
            elif isinstance(node, (ast.For, ast.comprehension)):
                stack = self._iterated(node.iter)
                if stack is not None:
                    self.member_names.update(dict.fromkeys(stores(node.target), stack))

    def _path(self, node: ast.AST) -> Path | None:
        """("a", "b") for `self.a.b`."""
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
            node = node.value
        return tuple(path) if isinstance(node, ast.Name) and node.id == self.source.self_name else None

    def _stack(self, node: ast.AST) -> Path | None:
        path = self._path(node)
        if path is not None:
            return path if path in self.stacks else None
        return self.stack_names.get(node.id) if isinstance(node, ast.Name) else None

    def _member(self, node: ast.AST) -> Path | None:
        if isinstance(node, ast.Attribute) and node.attr == "forward":
            node = node.value
        if isinstance(node, ast.Subscript):
            return self._stack(node.value)
        if not isinstance(node, ast.Name):
            return None
        for outer in self._around(node):  # one name may stand for members of several stacks
            heads = getattr(outer, "generators", [outer] if isinstance(outer, ast.For) else [])
            inside = next((self._iterated(head.iter) for head in heads if node.id in stores(head.target)), None)
            if inside is not None:
                return inside
        return self.member_names.get(node.id)

    def _iterated(self, node: ast.expr) -> Path | None:
        """The stack that a loop walks over: itself, or inside enumerate(), zip(), .items(), but not inside len()."""
        stack = self._stack(node)
        if stack is not None:
            return stack
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "len":
                return None
            inside = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            return next((s for part in (*inside, *node.args) if (s := self._iterated(part)) is not None), None)
        return None

    def _around(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                return
            yield node

    def _is_sequential(self, loop: ast.stmt, call: ast.Call) -> bool:
        """Whether a member's input is what an earlier member put out: layers, not experts."""
        before: list[ast.stmt] = []
        results: set[str] = set()
        reached = False
        for statement in _in_order(loop):
            reached = reached or any(node is call for node in ast.walk(statement))
            if not reached:
                before.append(statement)
            elif any(node is call for node in ast.walk(statement)) or loads(statement) & results:
                results |= written(statement)
        needed = set().union(*(loads(arg) for arg in (*call.args, *(k.value for k in call.keywords))))
        for statement in reversed(before):
            if isinstance(statement, ast.Assign) and stores(statement) & needed:
                needed = (needed - stores(statement)) | loads(statement.value)
        return bool(needed & results)

    def _evidence(self, loop: ast.AST) -> frozenset[str]:
        parts = (*feeders(self.source.tree, loop), loop)
        masks: set[str] = set()
        for part in parts:
            for node in ast.walk(part):
                if isinstance(node, ast.Assign) and (_is_mask(node.value) or loads(node.value) & masks):
                    masks |= stores(node)
        evidence: set[str] = set()
        for part in parts:
            evidence |= _evidence_in(part, masks)
            for node in ast.walk(part):
                helper = self._helper(node)
                if helper is not None:
                    evidence |= _evidence_in(helper.tree, set())
        return frozenset(evidence)

    def _helper(self, node: ast.AST) -> Source | None:
        """The method that a `self.helper(...)` call runs."""
        path = self._path(node.func) if isinstance(node, ast.Call) else None
        function = self.methods.get(path[0]) if path is not None and len(path) == 1 and path[0] != self.name else None
        return read(function) if function is not None else None


def _evidence_in(part: ast.AST, masks: set[str]) -> set[str]:
    evidence: set[str] = set()
    for node in ast.walk(part):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _CALLS or (name == "where" and len(node.args) == 1):
                evidence.add(name)
            elif name == "int" and node.args and isinstance(node.args[0], ast.Subscript):
                evidence.add("item")
        elif isinstance(node, ast.Subscript) and (_is_mask(node.slice) or loads(node.slice) & masks):
            evidence.add("mask")
        elif isinstance(node, ast.If):
            tested = {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
            if tested & _TESTS:
                evidence.add("if any")
    return evidence


def _is_mask(node: ast.AST) -> bool:
    """Whether an expression compares tensors, or makes a one-hot of ids."""
    return any(
        isinstance(n, ast.Compare) or (isinstance(n, ast.Attribute) and n.attr in _MASKS) for n in ast.walk(node)
    )


def _in_order(loop: ast.stmt) -> list[ast.stmt]:
    """The simple statements of a loop, nested ones too, as they are written."""
    simple = (s for suite in suites(loop) for s in suite if not hasattr(s, "body"))
    return sorted(simple, key=lambda s: (s.lineno, s.col_offset))
