"""`if mask.any():` without the branch: what the mask would pick is computed for all, and only its rows are written.

    if mask.any():                                    norm = F.normalize(x)
        norm = F.normalize(x[mask])             ->    _moeca_write(ids, mask, (norm @ centres.T).argmax(-1))
        ids[mask] = (norm @ centres.T).argmax(-1)

That is the same wherever the code treats every row by itself and an empty mask changes nothing, which the author's
`if` only says of the body. So both forms are always run and compared, with masks that pick all rows, some, and none.
"""

from __future__ import annotations

import ast
import copy
from functools import lru_cache

import torch
from torch import Tensor

from moeca_compile.expert_dispatch.source.method_source import Source, in_order

_WRITE, WATCH = "_moeca_write", "_moeca_watch"
_COUNTS = {"numel", "sum", "count_nonzero", "size", "__len__"}
_PICKS = {"where", "nonzero", "argwhere"}
_SHAPING = {"squeeze", "flatten", "view", "reshape", "nonzero"}


@lru_cache(maxsize=256)  # equal sources are one object: instances of a class then share one compiled graph
def straighten(source: Source, lines: frozenset[int] | None = None) -> Source:
    """`source` with no branch on an empty mask outside of loops, of those that are at `lines` (None: all); itself where
    there is none."""
    rows = _aliases(source.tree)
    change = _Straighten(rows, only=lines)
    tree = change.visit(copy.deepcopy(source.tree))
    if not change.lines:
        return source
    helpers = {**source.helpers, _WRITE: write}
    return Source(source.function, ast.fix_missing_locations(tree), source.file, helpers, branched=source)


def watched(source: Source) -> ast.FunctionDef:
    """The straightened tree, which also tells `WATCH(line, mask)` what each branch asked about."""
    change = _Straighten(_aliases(source.tree), watch=True)
    tree: ast.FunctionDef = change.visit(copy.deepcopy(source.tree))
    return ast.fix_missing_locations(tree)


def guards(source: Source) -> list[int]:
    """Lines of the branches on an empty mask outside of loops."""
    change = _Straighten(_aliases(source.tree))
    change.visit(copy.deepcopy(source.tree))
    return change.lines


def write(target: Tensor, mask: Tensor, value: Tensor | float) -> None:
    """target[mask] = value for a `value` that has all the rows; in place, as the original is."""
    picked = mask.reshape(mask.shape + (1,) * (target.dim() - mask.dim()))
    target.copy_(torch.where(picked, value, target))


def _aliases(tree: ast.stmt) -> dict[str, ast.expr]:
    """Names that hold the positions a mask picks, `rows = torch.where(mask)[0]`, and that mask."""
    positions: dict[str, ast.expr] = {}
    for statement in in_order(tree):
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Tuple) and len(target.elts) == 1:
                target = target.elts[0]
            mask = _positions_of(statement.value)
            if isinstance(target, ast.Name) and mask is not None:
                positions[target.id] = mask
    return positions


def _positions_of(node: ast.expr) -> ast.expr | None:
    """`mask` for where(mask)[0], mask.nonzero().squeeze(-1) and their like."""
    while True:
        if isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, base = node.func.attr, node.func.value
            if name in _PICKS and isinstance(base, ast.Name) and base.id == "torch" and len(node.args) == 1:
                return node.args[0]
            if name in _PICKS and name != "where" and not node.args:
                return base
            if name not in _SHAPING:
                return None
            node = base
        else:
            return None


class _Straighten(ast.NodeTransformer):
    def __init__(self, aliases: dict[str, ast.expr], watch: bool = False, only: frozenset[int] | None = None) -> None:
        self.aliases, self.watch, self.only, self.lines = aliases, watch, only, list[int]()

    def visit_For(self, node: ast.For) -> ast.For:
        return node  # an expert loop is a dispatch, not a branch

    def visit_While(self, node: ast.While) -> ast.While:
        return node

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        both = isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
        tests = node.test.values if both and isinstance(node.test, ast.BoolOp) else [node.test]
        masks = [mask for test in tests if (mask := self._emptiness(test)) is not None]
        if len(masks) != 1 or (self.only is not None and node.lineno not in self.only):
            self.generic_visit(node)
            return node
        self.lines.append(node.lineno)
        body = [self.visit(s) for s in node.body]
        straight = _AllRows(masks[0], {**self.aliases, **_aliases(node)})
        flat = [s for part in body for s in (part if isinstance(part, list) else [part])]
        statements: list[ast.stmt] = []
        for made in (straight.visit(s) for s in flat if not straight.is_alias(s)):
            statements.extend(made if isinstance(made, list) else [made])
        if self.watch:
            call = ast.Call(ast.Name(WATCH, ast.Load()), [ast.Constant(node.lineno), copy.deepcopy(masks[0])], [])
            statements.insert(0, ast.copy_location(ast.Expr(call), node))
        static = [test for test in tests if self._emptiness(test) is None]
        if not static:
            return statements
        rest = static[0] if len(static) == 1 else ast.BoolOp(ast.And(), static)
        return ast.copy_location(ast.If(rest, statements, [self.visit(s) for s in node.orelse]), node)

    def _emptiness(self, test: ast.expr) -> ast.expr | None:
        """The mask that a test asks whether it picks anything."""
        if isinstance(test, ast.Compare):
            zero = isinstance(test.comparators[0], ast.Constant) and test.comparators[0].value == 0
            more = isinstance(test.ops[0], (ast.Gt, ast.NotEq)) and len(test.ops) == 1
            return self._counted(test.left) if zero and more else None
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute) and test.func.attr in ("any", "item"):
            if test.func.attr == "item":
                return self._emptiness(test.func.value)
            called_on = test.func.value
            if isinstance(called_on, ast.Name) and called_on.id == "torch":
                return test.args[0] if len(test.args) == 1 else None
            return called_on if not test.args else None
        return self._counted(test)

    def _counted(self, node: ast.expr) -> ast.expr | None:
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
            base: ast.expr = node.value.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len":
            base = node.args[0]
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in (*_COUNTS, "item")
        ):
            base = node.func.value
            if node.func.attr == "item":
                return self._counted(base)
            if node.func.attr in ("sum", "count_nonzero"):
                return base if not node.args else None
        else:
            return None
        return self.aliases.get(base.id) if isinstance(base, ast.Name) else None


class _AllRows(ast.NodeTransformer):
    """x[mask] -> x, and y[mask] = v -> write(y, mask, v)."""

    def __init__(self, mask: ast.expr, aliases: dict[str, ast.expr]) -> None:
        self.mask = mask
        self.rows = {ast.dump(mask)}
        self.names = {name for name, of in aliases.items() if ast.dump(of) == ast.dump(mask)}
        self.rows |= {ast.dump(ast.Name(name, ast.Load())) for name in self.names}

    def is_alias(self, statement: ast.stmt) -> bool:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(target, ast.Tuple) and len(target.elts) == 1:
            target = target.elts[0]
        return isinstance(target, ast.Name) and target.id in self.names

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        return self._all_rows(node) or node

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        target = node.targets[0]
        if (
            len(node.targets) == 1
            and isinstance(target, ast.Subscript)
            and (base := self._all_rows(target)) is not None
        ):
            return self._write(node, base, self.visit(node.value))
        if isinstance(target, ast.Tuple) and len(node.targets) == 1:
            bases = [self._all_rows(e) if isinstance(e, ast.Subscript) else None for e in target.elts]
            if any(base is not None for base in bases):
                parts = [f"_moeca_part{i}" if base is not None else "" for i, base in enumerate(bases)]
                names = [ast.Name(p, ast.Store()) if p else e for p, e in zip(parts, target.elts, strict=True)]
                first = ast.copy_location(ast.Assign([ast.Tuple(names, ast.Store())], self.visit(node.value)), node)
                pairs = zip(parts, bases, strict=True)
                return [first, *(self._write(node, w, ast.Name(p, ast.Load())) for p, w in pairs if w is not None)]
        self.generic_visit(node)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        if isinstance(node.target, ast.Subscript) and (base := self._all_rows(node.target)) is not None:
            value = ast.BinOp(copy.deepcopy(base), node.op, self.visit(node.value))
            return self._write(node, base, value)
        self.generic_visit(node)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        """y.index_add_(0, rows, v) and y.index_copy_(0, rows, v)."""
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and len(call.args) == 3:
            axis, rows, value = call.args
            first = isinstance(axis, ast.Constant) and axis.value == 0
            if call.func.attr in ("index_add_", "index_copy_") and first and self._is_rows(rows):
                base, value = call.func.value, self.visit(value)
                if call.func.attr == "index_add_":
                    value = ast.BinOp(copy.deepcopy(base), ast.Add(), value)
                return self._write(node, base, value)
        self.generic_visit(node)
        return node

    def _is_rows(self, node: ast.expr) -> bool:
        return ast.dump(node) in self.rows

    def _all_rows(self, node: ast.Subscript) -> ast.expr | None:
        if self._is_rows(node.slice):
            return _loaded(node.value)
        if isinstance(node.slice, ast.Tuple) and self._is_rows(node.slice.elts[0]):
            rest = ast.Tuple([ast.Slice(), *node.slice.elts[1:]], ast.Load())
            return ast.copy_location(ast.Subscript(_loaded(node.value), rest, ast.Load()), node)
        return None

    def _write(self, node: ast.stmt, target: ast.expr, value: ast.expr) -> ast.stmt:
        call = ast.Call(ast.Name(_WRITE, ast.Load()), [target, copy.deepcopy(self.mask), value], [])
        return ast.copy_location(ast.Expr(call), node)


def _loaded(node: ast.expr) -> ast.expr:
    node = copy.deepcopy(node)
    if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)):
        node.ctx = ast.Load()
    return node
