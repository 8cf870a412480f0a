"""An expert loop in somebody's source, and the statements that feed it."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from moeca_compile.expert_dispatch.source.method_source import Source, in_order, loads, stores

# What shows that the rows of each expert are read out of a tensor, by the kind of dispatch.
SORTED = frozenset({"bincount", "numpy", "tolist", "histc"})  # tokens sorted by expert, then segments
GUARDED = "guard"  # a branch on an empty mask, outside of any loop
MASKED = frozenset({"nonzero", "argwhere", "where", "masked_select", "mask", "if any", "unique", "item"})


@dataclass(frozen=True, eq=False)
class Loop:
    """A place in a method that dispatches to experts, most often a loop.

    Attributes:
        name: of the method.
        source: the method.
        stack: the path of the container of the experts, or of their stacked parameter where `packed`.
        nest: the loop statements around the use of an expert, outermost first; empty for a comprehension, and where the
            method only branches on masks around experts that it uses in a static way.
        line: where reports place it; 0 is the method's own line.
        evidence: names in it that show that the rows of an expert are read out of a tensor.
        packed: whether it takes one expert's part of a parameter [E, ., .].
    """

    name: str
    source: Source
    stack: tuple[str, ...]
    nest: tuple[ast.stmt, ...] = ()
    line: int = 0
    evidence: frozenset[str] = frozenset()
    packed: bool = False

    @property
    def calls(self) -> frozenset[str]:
        """Names of all functions and methods that its method calls."""
        called = [node.func for node in ast.walk(self.source.tree) if isinstance(node, ast.Call)]
        return frozenset(f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called)

    @property
    def combined(self) -> bool:
        """Whether its method isn't the author's alone: it has helpers put into it, or branches straightened."""
        return bool(self.source.helpers)

    @property
    def where(self) -> str:
        """File and line, as reports give them."""
        return f"{self.source.file.rsplit('/', 1)[-1]}:{self.line or self.source.tree.lineno}"


def feeders(tree: ast.FunctionDef, loop: ast.AST) -> list[ast.Assign]:
    """Assignments before the loop that it depends on, however indirectly."""
    earlier: list[ast.Assign] = []
    for statement in in_order(tree):
        if any(node is loop for node in ast.walk(statement)):
            if not hasattr(statement, "body") or statement is loop:
                break
        elif isinstance(statement, ast.Assign):
            earlier.append(statement)
    needed, feeding = loads(loop), []
    for statement in reversed(earlier):
        if written(statement) & needed:
            needed |= loads(statement.value)
            feeding.append(statement)
    return feeding


def written(statement: ast.stmt) -> set[str]:
    """Names that a statement binds, or whose contents it changes by item assignment."""
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    bases = {
        n.id for t in targets if isinstance(t, ast.Subscript) for n in ast.walk(t.value) if isinstance(n, ast.Name)
    }
    return stores(statement) | bases
