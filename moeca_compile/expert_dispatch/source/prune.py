"""Takes out of a method what nothing reads any more."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

from moeca_compile.expert_dispatch.source.method_source import in_order, loads, stores, suites


def prune(tree: ast.FunctionDef) -> ast.FunctionDef:
    """A copy of `tree` without statements that only write local names which no other statement needs.

    Order doesn't matter to it: a name that is needed anywhere keeps every statement that writes it. Names of arguments
    count as needed, since a write to them can be seen from outside.
    """
    tree = copy.deepcopy(tree)
    args = (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)
    needed = {a.arg for a in args}
    statements = list(in_order(tree))
    live: set[ast.stmt] = set()
    while True:
        before = len(live)
        for statement in statements:
            if statement in live:
                continue
            if hasattr(statement, "body"):
                alive = any(inner in live for inner in in_order(statement))
            else:
                writes = written_locals(statement)
                alive = writes is None or bool(writes & needed)
            if alive:
                live.add(statement)
                needed |= _reads(statement)
        if len(live) == before:
            break
    for block in [tree.body, *suites(tree)]:
        block[:] = [s for s in block if s in live] or [ast.Pass(lineno=tree.lineno, col_offset=0)]
    return ast.fix_missing_locations(tree)


def written_locals(statement: ast.stmt) -> set[str] | None:
    """Local names that a simple statement writes, or whose contents it changes; None where it may do more."""
    if isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        targets: list[ast.expr] = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names: set[str] = set()
        for target in _flat(targets):
            base = target
            while isinstance(base, (ast.Subscript, ast.Starred)):
                base = base.value
            if not isinstance(base, ast.Name):
                return None  # an attribute
            names.add(base.id)
        return names
    if isinstance(statement, ast.Expr):
        call = statement.value
        if isinstance(call, ast.Constant):
            return set()
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "_moeca_write":
            return {n.id for n in ast.walk(call.args[0]) if isinstance(n, ast.Name)}
        while isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            call = call.func.value
        while isinstance(call, ast.Subscript):
            call = call.value
        return {call.id} if isinstance(call, ast.Name) else None
    if isinstance(statement, (ast.Pass, ast.Continue, ast.Break, ast.Assert, ast.Delete)):
        return set()
    return None


def _flat(targets: list[ast.expr]) -> Iterator[ast.expr]:
    for target in targets:
        if isinstance(target, (ast.Tuple, ast.List)):
            yield from _flat(target.elts)
        else:
            yield target


def _reads(statement: ast.stmt) -> set[str]:
    """What a statement reads itself; of a compound one, only its head."""
    if not hasattr(statement, "body"):
        # what it changes in place must be made before
        return loads(statement) | (written_locals(statement) or set())
    names: set[str] = set()
    for field in ("test", "iter", "items", "subject"):
        part = getattr(statement, field, None)
        for item in part if isinstance(part, list) else [part] if part is not None else []:
            names |= loads(item)
    return names | (stores(statement.target) if isinstance(statement, ast.For) else set())
