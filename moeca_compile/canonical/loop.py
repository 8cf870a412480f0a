"""An expert loop in somebody's source, and the statements that feed it."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from moeca_compile.canonical.source import Source, loads, stores, suites

# What shows that the rows of each expert are read out of a tensor, by the kind of dispatch.
SORTED = frozenset({"bincount", "numpy", "tolist", "histc"})  # tokens sorted by expert, then segments
MASKED = frozenset({"nonzero", "argwhere", "where", "masked_select", "mask", "if any", "unique", "item"})


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
        if written(statement) & needed:
            needed |= loads(statement.value)
            found.append(statement)
    return found


def written(statement: ast.stmt) -> set[str]:
    """Names that a statement binds, or whose contents it changes by item assignment."""
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    bases = {
        n.id for t in targets if isinstance(t, ast.Subscript) for n in ast.walk(t.value) if isinstance(n, ast.Name)
    }
    return stores(statement) | bases
