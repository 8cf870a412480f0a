"""A method's source as a tree with the file's own line numbers, and a changed tree as a function again."""

from __future__ import annotations

import ast
import copy
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

_HARMLESS_DECORATORS = {"no_grad", "inference_mode"}  # the canonical form is for inference anyway


@dataclass(frozen=True, eq=False)
class Source:
    """A function, what it was written as, and where. `helpers` are names that its tree uses and its globals lack,
    `branched` is the source with the branches that this one has straightened."""

    function: types.FunctionType
    tree: ast.FunctionDef
    file: str
    helpers: Mapping[str, object] = field(default_factory=dict)
    branched: Source | None = None

    @property
    def self_name(self) -> str:
        return self.parameters[0] if self.parameters else ""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the positional parameters, `self` first."""
        return tuple(arg.arg for arg in (*self.tree.args.posonlyargs, *self.tree.args.args))

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the parameters without a default, `self` left out."""
        return self.parameters[1 : len(self.parameters) - len(self.tree.args.defaults)]

    @property
    def is_plain(self) -> bool:
        """Only positional parameters, all required."""
        args = self.tree.args
        return not (args.defaults or args.vararg or args.kwarg or args.kwonlyargs)

    @property
    def decorators(self) -> tuple[str, ...]:
        """Decorators that a rewritten function would lose; those that only switch gradients off don't count."""
        names = (ast.unparse(d) for d in self.tree.decorator_list)
        return tuple(n for n in names if n.split("(")[0].split(".")[-1] not in _HARMLESS_DECORATORS)


@lru_cache(maxsize=512)
def read(function: types.FunctionType) -> Source | None:
    """The source of a plain method, or None where there is none (built at run time, or no def)."""
    function = inspect.unwrap(function)
    try:
        lines, start = inspect.getsourcelines(function)
        # An `if` above keeps the indentation as it is: dedenting would change texts that span lines.
        shift = 1 if lines[0][:1].isspace() else 0
        body = ast.parse("if 1:\n" * shift + "".join(lines)).body
    except (OSError, TypeError, SyntaxError):
        return None
    tree = body[0].body[0] if isinstance(body[0], ast.If) else body[0]
    if not isinstance(tree, ast.FunctionDef):
        return None
    ast.increment_lineno(tree, start - 1 - shift)
    return Source(function, tree, inspect.getsourcefile(function) or function.__code__.co_filename)


def methods_of(kind: type) -> dict[str, types.FunctionType]:
    """The plain methods of a module's class that its author wrote, by name."""
    methods: dict[str, types.FunctionType] = {}
    for cls in kind.__mro__:
        if cls.__module__.startswith("torch.nn"):
            break
        for name, value in vars(cls).items():
            if isinstance(value, types.FunctionType):
                methods.setdefault(name, value)
    return methods


def rebuild(source: Source, tree: ast.FunctionDef, helpers: Mapping[str, object]) -> types.FunctionType:
    """Compile a changed copy of `source.tree` with the original's globals, defaults and closure.

    `helpers` are further names that the new code may use; they are closure cells, so that the module's globals stay
    untouched. Zero-argument `super()` and private names work: the code is compiled inside a class of the same name.
    """
    original = source.function
    definition = copy.deepcopy(tree)
    definition.decorator_list = []
    definition.args.defaults = []
    definition.args.kw_defaults = [None] * len(definition.args.kwonlyargs)
    cells: dict[str, Any] = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    cells.update({name: types.CellType(value) for name, value in {**source.helpers, **helpers}.items()})
    owner = original.__qualname__.split(".")[-2] if "." in original.__qualname__ else "_"
    if not owner.isidentifier():
        owner = "_"
    shell = ast.parse("def _shell(): \n class _: pass").body[0]
    assert isinstance(shell, ast.FunctionDef)
    shell.args.args = [ast.arg(name) for name in cells if name != "__class__"]
    inner = shell.body[0]
    assert isinstance(inner, ast.ClassDef)
    inner.name, inner.body = owner, [definition]
    module = ast.fix_missing_locations(ast.Module([shell], []))
    code = _code(compile(module, source.file, "exec", dont_inherit=True), ("_shell", owner, definition.name))
    closure = tuple(cells[name] for name in code.co_freevars)
    function = types.FunctionType(code, original.__globals__, original.__name__, original.__defaults__, closure)
    function.__kwdefaults__ = original.__kwdefaults__
    function.__qualname__, function.__module__ = original.__qualname__, original.__module__
    return function


def replaced(tree: ast.FunctionDef, new: Mapping[ast.stmt, Sequence[ast.stmt]]) -> ast.FunctionDef:
    """A copy of `tree` with statements exchanged for others, which may be some of its own, each by identity."""
    memo: dict[int, Any] = {}
    clone: ast.FunctionDef = copy.deepcopy(tree, memo)
    originals = {id(memo[id(old)]): old for old in new}
    for block in list(suites(clone)):
        for statement in list(block):
            old = originals.get(id(statement))
            if old is not None:
                at = block.index(statement)
                block[at : at + 1] = [memo.get(id(s)) or located(s, old) for s in new[old]]
    return clone


def located(statement: ast.stmt, place: ast.stmt) -> ast.stmt:
    """The same statement, at the line of another one: errors in it point there."""
    for node in ast.walk(statement):
        if isinstance(node, (ast.stmt, ast.expr)):
            ast.copy_location(node, place)
    return statement


def suites(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements below `tree`, without those of nested functions and classes."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        block = getattr(tree, name, None)
        if not isinstance(block, list):
            continue
        if block and isinstance(block[0], ast.stmt):
            yield block
        for child in block:
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from suites(child)


def in_order(tree: ast.AST) -> Iterator[ast.stmt]:
    """Every statement below `tree`, as it is written, without those of nested functions and classes."""
    for name in ("body", "handlers", "cases", "orelse", "finalbody"):
        for child in getattr(tree, name, None) or ():
            if isinstance(child, ast.stmt):
                yield child
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from in_order(child)


def loads(tree: ast.AST) -> set[str]:
    """Names that the code reads; `x += 1` and `x[0] = 1` read x."""
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    names |= {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    return names


def stores(tree: ast.AST) -> set[str]:
    """Names that the code binds."""
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _code(code: types.CodeType, names: tuple[str, ...]) -> types.CodeType:
    for name in names:
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    return code
