"""The patch itself: one entry in a module instance's `__dict__`, seen only while a compiler traces."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeca_compile.canonical.attempt import Rewrite

_numbers = itertools.count()


@dataclass(frozen=True)
class Installed:
    """What a patched method carries about itself."""

    rewrite: Rewrite
    family: str
    verified: bool


def install(module: nn.Module, rewrite: Rewrite, family: str, verified: bool) -> None:
    """Let compilers trace `rewrite` for `module`; plain calls, and training, still run the original code.

    A bound method in `__dict__` is what `copy.deepcopy` binds to the copy, so that the copy reads its own weights.
    """
    original = getattr(type(module), rewrite.name)
    method = _method(original, Installed(rewrite, family, verified))
    module.__dict__[rewrite.name] = types.MethodType(method, module)


def uninstall(module: nn.Module) -> int:
    """Take the patches off; how many there were."""
    names = list(installed(module))
    for name in names:
        del module.__dict__[name]
    return len(names)


def installed(module: nn.Module) -> dict[str, Installed]:
    """The patches on a module instance, by method name."""
    found: dict[str, Installed] = {}
    for name, value in vars(module).items():
        note = getattr(value.__func__, "moeca", None) if isinstance(value, types.MethodType) else None
        if isinstance(note, Installed):
            found[name] = note
    return found


def replaced(module: nn.Module, name: str) -> bool:
    """Whether someone put another method of that name on the instance; the class's own code again doesn't count."""
    if name not in vars(module):
        return False
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in (vars(module)[name], getattr(type(module), name))]
    return len({code and (code.co_filename, code.co_firstlineno, code.co_code) for code in codes}) > 1


# Equal patches are one function: modules of one class then share one compiled graph.
@functools.lru_cache(maxsize=512)
def _method(original: Callable[..., Any], note: Installed) -> Callable[..., Any]:
    canonical = note.rewrite.function()

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not self.training:
            return canonical(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    # Dynamo keeps graphs and recompile counts on code objects: each patch needs one of its own.
    mark = f"moeca patch {next(_numbers)}"
    method.__code__ = method.__code__.replace(co_consts=(*method.__code__.co_consts, mark))
    functools.update_wrapper(method, original)
    method.moeca = note  # type: ignore[attr-defined]
    return method
