"""Puts helpers into the method that calls them, where the trouble of a dispatch is in a helper.

A router that reads a capacity back to the host, or branches on whether a mask is empty, is often a module or a
function of its own. One method that holds it all can be run, changed and proven as a whole.
"""

from __future__ import annotations

import ast
import copy
import itertools
import types
from collections.abc import Iterator
from functools import lru_cache

from torch import nn

from moeca_compile.expert_dispatch.source.method_source import Source, in_order, loads, located, read, stores

READS = {"item", "tolist", "numpy", "bincount", "nonzero", "argwhere", "unique", "any", "all", "numel", "histc"}
_SCOPES = (ast.Yield, ast.YieldFrom, ast.Await, ast.Lambda, ast.FunctionDef, ast.ClassDef, ast.Global, ast.Nonlocal)
_DEPTH = 4
_Bound = tuple[ast.expr | None, types.FunctionType]


def flatten(source: Source, module: nn.Module | None) -> Source:
    """`source` with every helper in it that reads sizes or branches out of a tensor; itself where there is none.

    Only helpers with readable plain code that returns once, at its end; a submodule with hooks stays a call. `module`
    is what the function's first argument is, None for a function that is no method.
    """
    helpers: list[tuple[tuple[int, int], Source, str]] = []
    for statement in in_order(source.tree):
        call = getattr(statement, "value", None)
        if not isinstance(statement, (ast.Assign, ast.Return)) or not isinstance(call, ast.Call):
            continue
        owner, function = _callee(source, module, call.func) or (None, source.function)
        inner = read(function) if function is not source.function else None
        holder = owner_module(module, owner)
        if inner is not None and _fits(inner, call) and troubled(inner, holder):
            helpers.append((_place(statement), flatten(inner, holder), ast.unparse(owner) if owner else ""))
    return _flat(source, tuple(helpers)) if helpers else source


def troubled(source: Source, module: nn.Module | None, depth: int = _DEPTH) -> bool:
    """Whether a function, or one that it calls, reads tensors back."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in READS:
            return True
        bound = _callee(source, module, node.func) if isinstance(node, ast.Call) and depth else None
        inner = read(bound[1]) if bound is not None else None
        if bound is None or inner is None or inner is source:
            continue
        if troubled(inner, owner_module(module, bound[0]), depth - 1):
            return True
    return False


def owner_module(module: nn.Module | None, owner: ast.expr | None) -> nn.Module | None:
    """The module that `self.a.b` names."""
    holder: object = module if owner is not None else None
    for name in ast.unparse(owner).split(".")[1:] if owner is not None else ():
        holder = getattr(holder, name, None)
    return holder if isinstance(holder, nn.Module) else None


def _callee(source: Source, module: nn.Module | None, func: ast.expr) -> _Bound | None:
    """Whose `self` a called function gets, as an expression, and the function: a method, a forward, a plain one."""
    if isinstance(func, ast.Name):
        made = source.function.__globals__.get(func.id)
        return (None, made) if isinstance(made, types.FunctionType) and _theirs(made) else None
    parts = ast.unparse(func).split(".") if isinstance(func, ast.Attribute) else []
    if module is None or not parts or parts[0] != source.self_name or not all(p.isidentifier() for p in parts):
        return None
    assert isinstance(func, ast.Attribute)
    holder = owner_module(module, func.value)
    made = getattr(type(holder), func.attr, None)
    if holder is not None and isinstance(made, types.FunctionType):
        return (func.value, made) if _theirs(made) and func.attr not in vars(holder) else None
    called = owner_module(module, func)
    if called is None or called._forward_hooks or called._forward_pre_hooks or "forward" in vars(called):
        return None
    forward = type(called).forward
    return (func, forward) if isinstance(forward, types.FunctionType) and _theirs(forward) else None


def _theirs(function: types.FunctionType) -> bool:
    return not function.__module__.startswith("torch.")


def _place(statement: ast.stmt) -> tuple[int, int]:
    return statement.lineno, statement.col_offset


def _fits(inner: Source, call: ast.Call) -> bool:
    """Whether a helper's statements can stand in place of its call: plain code that returns once, at its end."""
    args, body = inner.tree.args, inner.tree.body
    if inner.decorators or args.vararg or args.kwarg or inner.function.__closure__:
        return False
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        return False
    if any(_is_bound_to_its_function(node) for statement in body for node in ast.walk(statement)):
        return False
    returns = [s for s in in_order(inner.tree) if isinstance(s, ast.Return)]
    return len(returns) == 1 and returns[0] is body[-1] and returns[0].value is not None


def _is_bound_to_its_function(node: ast.AST) -> bool:
    """Whether code means something else in another function: scopes of its own, yields, private names, super()."""
    if isinstance(node, ast.Attribute):
        return node.attr.startswith("__") and node.attr[-1] != "_"
    return isinstance(node, _SCOPES) or (isinstance(node, ast.Name) and node.id == "super")


@lru_cache(maxsize=256)  # equal flat sources are one object: instances of a class then share one compiled graph
def _flat(source: Source, key: tuple[tuple[tuple[int, int], Source, str], ...]) -> Source:
    tree = copy.deepcopy(source.tree)
    helpers = dict(source.helpers)
    number = itertools.count(sum(name.startswith("_moeca") for name in helpers))
    todo = {place: (inner, owner) for place, inner, owner in key}
    own = set(source.parameters).union(*(stores(s) for s in source.tree.body))
    shared = {k: v for k, v in source.function.__globals__.items() if k not in own}
    _replace(tree, todo, helpers, shared, number)
    return Source(source.function, tree, source.file, helpers)


def _replace(
    tree: ast.AST,
    todo: dict[tuple[int, int], tuple[Source, str]],
    helpers: dict[str, object],
    shared: dict[str, object],
    number: Iterator[int],
) -> None:
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        block = getattr(tree, name, None)
        if not isinstance(block, list):
            continue
        new: list[ast.AST] = []
        for child in block:
            call = getattr(child, "value", None)
            if isinstance(child, (ast.Assign, ast.Return)) and isinstance(call, ast.Call) and _place(child) in todo:
                inner, owner = todo[_place(child)]
                new.extend(_body(child, call, inner, owner, helpers, shared, f"_moeca{next(number)}"))
            else:
                _replace(child, todo, helpers, shared, number)
                new.append(child)
        setattr(tree, name, new)


def _body(
    statement: ast.Assign | ast.Return,
    call: ast.Call,
    inner: Source,
    owner: str,
    helpers: dict[str, object],
    shared: dict[str, object],
    mark: str,
) -> list[ast.stmt]:
    """The helper's statements in place of its call, with names of their own; `shared` globals keep theirs."""
    tree = copy.deepcopy(inner.tree)
    self_name = inner.self_name if owner else ""
    values = _arguments(inner, call, bool(owner), helpers, mark)
    local = set(values).union(*(stores(s) for s in tree.body))
    renamed = {name: f"{mark}_{name}" for name in local}
    outer = {**inner.function.__globals__, **inner.helpers}
    read_here = set[str]().union(*(loads(s) for s in tree.body))
    for name in sorted(read_here - local - {self_name}):
        is_shared = name in shared and shared[name] is inner.function.__globals__.get(name, helpers)
        if name in outer and not is_shared:
            helpers[f"{mark}_{name}"] = outer[name]
            renamed[name] = f"{mark}_{name}"
    rename = _Rename(renamed, self_name, owner)
    first = [ast.Assign([ast.Name(renamed[name], ast.Store())], value) for name, value in values.items()]
    body = [rename.visit(s) for s in tree.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    last = body.pop()
    assert isinstance(last, ast.Return)
    assert last.value is not None
    if isinstance(statement, ast.Assign):
        last = ast.Assign(statement.targets, last.value)
    new = [located(s, statement) for s in (*first, *body, last)]  # errors then point at the line of the call
    for part in new:
        for node in ast.walk(part):
            if isinstance(node, (ast.stmt, ast.expr)):
                node.end_lineno = node.lineno
    return [ast.fix_missing_locations(part) for part in new]


def _arguments(
    inner: Source, call: ast.Call, bound: bool, helpers: dict[str, object], mark: str
) -> dict[str, ast.expr]:
    """What the helper's parameters get in a call, by name; defaults come from `helpers`."""
    function, args = inner.function, inner.tree.args
    names = [a.arg for a in (*args.posonlyargs, *args.args)][bound:]
    values = dict(zip(names, call.args, strict=False))
    values.update({k.arg: k.value for k in call.keywords if k.arg})
    defaults = dict(zip(reversed(names), reversed(function.__defaults__ or ()), strict=False))
    for name, value in {**defaults, **(function.__kwdefaults__ or {})}.items():
        if name not in values:
            helpers[f"{mark}_default_{name}"] = value
            values[name] = ast.Name(f"{mark}_default_{name}", ast.Load())
    return values


class _Rename(ast.NodeTransformer):
    def __init__(self, names: dict[str, str], self_name: str, owner: str) -> None:
        self.names, self.self_name, self.owner = names, self_name, owner

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if self.self_name and node.id == self.self_name:
            return ast.parse(self.owner, mode="eval").body
        return ast.Name(self.names.get(node.id, node.id), node.ctx)
