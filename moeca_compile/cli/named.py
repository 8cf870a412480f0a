"""Whether a function exists, read from its source text: to import a model's module takes the seconds of torch."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from itertools import accumulate
from pathlib import Path

from moeca_compile.errors import OptionError


def check(source: str, arguments: int) -> None:
    """Refuse what can't be a function with so many arguments. What the source text doesn't show passes.

    Args:
        source: `MODULE:FUNCTION`.
        arguments: how many the function is called with, by position.

    Raises:
        OptionError: another form, no such module, no such name in it, or a function with other arguments.
    """
    module, name = parts_of(source)
    here_first()
    spec = _spec_of(module, source)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise OptionError(f"{source!r} can't be loaded: {error}") from error
    names = _names_of(tree)
    if "*" in names or "__getattr__" in names:
        return
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"{source!r} can't be loaded: {spec.origin} defines no {name!r}{hint}")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name and not node.decorator_list:
            _check_arguments(source, node, arguments)


def parts_of(source: str) -> tuple[str, str]:
    """Module and name.

    Raises:
        OptionError: another form.
    """
    module, _, name = source.partition(":")
    if not module or not name:
        raise OptionError(f"{source!r}: expected MODULE:FUNCTION, as in my.models:build")
    return module, name


def here_first() -> None:
    """Let modules be imported from the current folder, as `python -m` does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _spec_of(module: str, source: str) -> ModuleSpec | None:
    """Where a module lies, without importing its packages. None: it is loaded already, or made without a file."""
    folders = None
    spec = None
    for name in accumulate(module.split("."), "{}.{}".format):
        spec = _ask_finders(name, folders)
        if spec is None:
            if name in sys.modules:
                return None
            raise OptionError(
                f"{source!r} can't be loaded: no module {name!r} in the current folder or among the installed packages"
            )
        folders = spec.submodule_search_locations
        if folders is None and name != module:
            raise OptionError(f"{source!r} can't be loaded: {name!r} is a module, not a package")
    return spec


def _ask_finders(name: str, folders: Sequence[str] | None) -> ModuleSpec | None:
    """What `importlib.util.find_spec` does, which imports the packages above the module."""
    for finder in sys.meta_path:
        spec = finder.find_spec(name, folders)
        if spec is not None:
            return spec
    return None


def _names_of(tree: ast.Module) -> set[str]:
    """The names that a module may have, also those that it gets under an `if` or in a `try`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _check_arguments(source: str, function: ast.FunctionDef, count: int) -> None:
    taken = function.args
    positional = [*taken.posonlyargs, *taken.args]
    needed = len(positional) - len(taken.defaults)
    too_few = len(positional) < count and taken.vararg is None
    if needed > count or too_few or None in taken.kw_defaults:
        signature = ", ".join(arg.arg for arg in (*positional, *taken.kwonlyargs))
        call = "no arguments" if not count else "(model, seed)"
        raise OptionError(f"{source!r} is {function.name}({signature}), but it is called with {call}")
