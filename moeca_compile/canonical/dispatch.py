"""Find expert dispatch in a module's source: a loop that calls the members of a stack on rows picked by data.

Two structural facts tell such a loop from a loop over layers: the experts run side by side (no expert's output is
another's input), and which rows each one gets is read out of a tensor (`evidence`). A loop without evidence (all
experts on all tokens, static slices) can be traced as it is.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moeca_compile.canonical.source import Source, loads, read, stores, suites

SORTED = frozenset({"bincount", "numpy", "tolist", "histc"})  # tokens sorted by expert, then segments
MASKED = frozenset({"nonzero", "argwhere", "where", "masked_select", "mask", "if any", "unique", "item"})

_MAX_LEAVES = 16  # more parts than this, and it's a block rather than an expert
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Loop:
    """A loop over experts in method `name`: over the members of the container at `stack`, or over the first axis of
    the parameter of that name where `packed`.

    `nest` holds the loop statements around the use of an expert, outermost first; it is empty for a comprehension.
    """

    name: str
    source: Source
    stack: tuple[str, ...]
    nest: tuple[ast.stmt, ...]
    line: int
    evidence: frozenset[str]
    packed: bool = False

    @property
    def where(self) -> str:
        return f"{self.source.file.rsplit('/', 1)[-1]}:{self.line}"


def stacks(module: nn.Module) -> Iterator[tuple[str, ...]]:
    """Paths of the containers with two or more expert-sized members: the module itself, its children, theirs."""
    levels: list[tuple[tuple[str, ...], nn.Module]] = [((), module)] if isinstance(module, _CONTAINERS) else []
    for name, child in module._modules.items():
        if child is not None:
            levels.append(((name,), child))
            levels.extend(((name, inner), m) for inner, m in child._modules.items() if m is not None)
    for path, container in levels:
        members = list(container._modules.values())
        if len(members) > 1 and hasattr(type(container), "__getitem__") and all(map(_expert_sized, members)):
            yield path


def packed_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters that can hold one matrix per expert: [E, ., .]."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return {name: p for name, p in own.items() if p.dim() == 3 and p.shape[0] > 1}


def _expert_sized(member: nn.Module | None) -> bool:
    if member is None:
        return False
    return sum(not m._modules for m in member.modules()) <= _MAX_LEAVES


def find_loops(module: nn.Module) -> list[Loop]:
    """The data-dependent expert loops in the methods of `module`'s class."""
    known = set(stacks(module))
    packed: set[tuple[str, ...]] = {(name,) for name in packed_weights(module)}
    found: list[Loop] = []
    for name, function in _naming(module, known | packed).items():
        source = read(function)
        if source is not None and source.parameters:
            found.extend(_Reader(module, name, source, known, packed).loops())
    return found


def unreadable(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Methods that name a stack of experts but have no source to look into, and that stack."""
    found: dict[str, tuple[str, ...]] = {}
    for path in stacks(module):
        found.update({name: path for name, f in _naming(module, {path}).items() if path and read(f) is None})
    return found


def _naming(module: nn.Module, paths: set[tuple[str, ...]]) -> dict[str, types.FunctionType]:
    """The methods worth reading: those that name something on one of the paths."""
    words = {word for path in paths for word in path}
    own = methods(module) if paths else {}
    return {name: f for name, f in own.items() if name != "__init__" and (() in paths or words & _words(f))}


def methods(module: nn.Module) -> dict[str, types.FunctionType]:
    """The plain methods of the module's class that its author wrote, by name."""
    found: dict[str, types.FunctionType] = {}
    for cls in type(module).__mro__:
        if cls is nn.Module or cls in _CONTAINERS:
            break
        for name, value in vars(cls).items():
            if isinstance(value, types.FunctionType):
                found.setdefault(name, value)
    return found


def _words(function: types.FunctionType) -> set[str]:
    """Attribute names in the function that its decorators wrap, and in the functions inside it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    words: set[str] = set()
    todo = [function.__code__]
    while todo:
        code = todo.pop()
        words.update(code.co_names)
        todo.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return words


class _Reader:
    """Reads one method."""

    def __init__(
        self, module: nn.Module, name: str, source: Source, known: set[tuple[str, ...]], packed: set[tuple[str, ...]]
    ) -> None:
        self.module, self.name, self.source, self.known, self.packed = module, name, source, known, packed
        self.parents = {child: node for node in ast.walk(source.tree) for child in ast.iter_child_nodes(node)}
        self.stack_names: dict[str, tuple[str, ...]] = {}
        self.member_names: dict[str, tuple[str, ...]] = {}
        self._bind()

    def loops(self) -> Iterator[Loop]:
        seen: set[ast.AST] = set()
        for use in ast.walk(self.source.tree):
            stack = self._used(use)
            if stack is None:
                continue
            around = list(self._around(use))
            nest = tuple(n for n in reversed(around) if isinstance(n, (ast.For, ast.While)))
            comprehensions = (n for n in around if isinstance(n, (ast.ListComp, ast.GeneratorExp)))
            repeated: ast.stmt | ast.expr | None = nest[0] if nest else next(comprehensions, None)
            if repeated is None or repeated in seen:
                continue
            if nest and isinstance(use, ast.Call) and self._is_sequential(nest[-1], use):
                continue
            seen.add(repeated)
            evidence = self._evidence(repeated)
            if evidence:
                packed = stack in self.packed
                yield Loop(self.name, self.source, stack, nest, repeated.lineno, evidence, packed)

    def _used(self, node: ast.AST) -> tuple[str, ...] | None:
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

    def _path(self, node: ast.AST) -> tuple[str, ...] | None:
        """("a", "b") for `self.a.b`."""
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
            node = node.value
        return tuple(path) if isinstance(node, ast.Name) and node.id == self.source.self_name else None

    def _stack(self, node: ast.AST) -> tuple[str, ...] | None:
        path = self._path(node)
        if path is not None:
            return path if path in self.known else None
        return self.stack_names.get(node.id) if isinstance(node, ast.Name) else None

    def _member(self, node: ast.AST) -> tuple[str, ...] | None:
        if isinstance(node, ast.Attribute) and node.attr == "forward":
            node = node.value
        if isinstance(node, ast.Subscript):
            return self._stack(node.value)
        return self.member_names.get(node.id) if isinstance(node, ast.Name) else None

    def _iterated(self, node: ast.expr) -> tuple[str, ...] | None:
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
                results |= _written(statement)
        needed = set().union(*(loads(arg) for arg in (*call.args, *(k.value for k in call.keywords))))
        for statement in reversed(before):
            if isinstance(statement, ast.Assign) and stores(statement) & needed:
                needed = (needed - stores(statement)) | loads(statement.value)
        return bool(needed & results)

    def _evidence(self, loop: ast.AST) -> frozenset[str]:
        feeding = feeders(self.source.tree, loop)
        found: set[str] = set()
        masks: set[str] = set()
        for part in (*feeding, loop):
            for node in ast.walk(part):
                if isinstance(node, ast.Assign) and _is_mask(node.value):
                    masks |= stores(node)
        for part in (*feeding, loop):
            found |= self._evidence_in(part, masks)
            for node in ast.walk(part):
                helper = self._helper(node)
                if helper is not None:
                    found |= self._evidence_in(helper.tree, set())
        return frozenset(found)

    def _helper(self, node: ast.AST) -> Source | None:
        """The method that a `self.helper(...)` call runs."""
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            function = methods(self.module).get(node.func.attr)
            if node.func.value.id == self.source.self_name and function is not None and node.func.attr != self.name:
                return read(function)
        return None

    @staticmethod
    def _evidence_in(part: ast.AST, masks: set[str]) -> set[str]:
        found: set[str] = set()
        for node in ast.walk(part):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in (SORTED | MASKED) - {"where", "mask"} or (name == "where" and len(node.args) == 1):
                    found.add(name)
                elif name == "int" and node.args and isinstance(node.args[0], ast.Subscript):
                    found.add("item")
            elif isinstance(node, ast.Subscript) and (_is_mask(node.slice) or loads(node.slice) & masks):
                found.add("mask")
            elif isinstance(node, ast.If):
                tested = {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
                if tested & {"any", "numel", "sum", "count_nonzero", "max"}:
                    found.add("if any")
        return found


def feeders(tree: ast.FunctionDef, loop: ast.AST) -> list[ast.Assign]:
    """Assignments before the loop that it depends on, however indirectly."""
    earlier = [
        s
        for suite in suites(tree)
        for s in suite
        if isinstance(s, ast.Assign) and s.lineno < getattr(loop, "lineno", 0)
    ]
    needed, found = loads(loop), []
    for statement in sorted(earlier, key=lambda s: s.lineno, reverse=True):
        if _written(statement) & needed:
            needed |= loads(statement.value)
            found.append(statement)
    return found


def _is_mask(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd))


def _written(statement: ast.stmt) -> set[str]:
    """Names that a statement binds, or whose contents it changes by item assignment."""
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    bases = {
        n.id for t in targets if isinstance(t, ast.Subscript) for n in ast.walk(t.value) if isinstance(n, ast.Name)
    }
    return stores(statement) | bases


def _in_order(loop: ast.stmt) -> list[ast.stmt]:
    """The simple statements of a loop, nested ones too, as they are written."""
    simple = (s for suite in suites(loop) for s in suite if not hasattr(s, "body"))
    return sorted(simple, key=lambda s: (s.lineno, s.col_offset))
