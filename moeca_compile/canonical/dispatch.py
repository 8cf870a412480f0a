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
    """A loop over the members of the stack at `stack` in method `name`.

    `nest` holds the loop statements around the expert call, outermost first; it is empty for a comprehension.
    """

    name: str
    source: Source
    stack: tuple[str, ...]
    nest: tuple[ast.stmt, ...]
    line: int
    evidence: frozenset[str]

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


def _expert_sized(member: nn.Module | None) -> bool:
    if member is None:
        return False
    return sum(not m._modules for m in member.modules()) <= _MAX_LEAVES


def find_loops(module: nn.Module) -> list[Loop]:
    """The data-dependent expert loops in the methods of `module`'s class."""
    known = set(stacks(module))
    found: list[Loop] = []
    if not known:
        return found
    for name, function in methods(module).items():
        names = {word for path in known for word in path}
        if names and not names.intersection(_words(function)):
            continue  # doesn't name a stack: not worth reading
        source = read(function)
        if source is not None and source.parameters:
            found.extend(_Reader(module, name, source, known).loops())
    return found


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

    def __init__(self, module: nn.Module, name: str, source: Source, known: set[tuple[str, ...]]) -> None:
        self.module, self.name, self.source, self.known = module, name, source, known
        self.parents = {child: node for node in ast.walk(source.tree) for child in ast.iter_child_nodes(node)}
        self.stack_names: dict[str, tuple[str, ...]] = {}
        self.member_names: dict[str, tuple[str, ...]] = {}
        self._bind()

    def loops(self) -> Iterator[Loop]:
        seen: set[ast.AST] = set()
        for call in ast.walk(self.source.tree):
            stack = self._member(call.func) if isinstance(call, ast.Call) else None
            if not isinstance(call, ast.Call) or stack is None:
                continue
            around = list(self._around(call))
            nest = tuple(n for n in reversed(around) if isinstance(n, (ast.For, ast.While)))
            repeated = nest or tuple(n for n in around if isinstance(n, (ast.ListComp, ast.GeneratorExp)))
            if not repeated or repeated[0] in seen or (nest and self._is_sequential(nest[-1], call)):
                continue
            seen.add(repeated[0])
            evidence = self._evidence(repeated[0])
            if evidence:
                yield Loop(self.name, self.source, stack, nest, repeated[0].lineno, evidence)

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

    def _stack(self, node: ast.AST) -> tuple[str, ...] | None:
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        if node.id == self.source.self_name:
            return tuple(path) if tuple(path) in self.known else None
        return self.stack_names.get(node.id) if not path else None

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
            elif isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                if any(node is call for node in ast.walk(statement)) or loads(statement) & results:
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
