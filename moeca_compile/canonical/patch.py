"""The patch itself: one entry in a module instance's `__dict__`, seen only while a compiler traces."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeca_compile.canonical.attempt import Rewrite


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
        note = getattr(getattr(value, "__func__", None), "moeca", None)
        if isinstance(note, Installed):
            found[name] = note
    return found


def replaced(module: nn.Module, name: str) -> bool:
    """Whether someone else put a method of their own on the instance. An unpickled patch is the class's own method."""
    own = vars(module).get(name)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(module), name)


# Equal patches are one function: modules of one class then share one compiled graph.
@functools.lru_cache(maxsize=512)
def _method(original: Callable[..., Any], note: Installed) -> types.FunctionType:
    canonical = note.rewrite.function()

    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not self.training:
            return canonical(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    method.moeca = note  # type: ignore[attr-defined]
    assert isinstance(method, types.FunctionType)
    return method
