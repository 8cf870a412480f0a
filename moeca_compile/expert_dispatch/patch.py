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

from moeca_compile.expert_dispatch.proof.anatomy import ADAPTED, SAME
from moeca_compile.expert_dispatch.proof.candidate import Pin, Rewrite
from moeca_compile.expert_dispatch.routed import Experts

_numbers = itertools.count()


@dataclass(frozen=True)
class Installed:
    """What a patched method carries about itself."""

    rewrite: Rewrite
    family: str
    verified: bool

    def condition(self, module: nn.Module) -> int:
        """SAME, ADAPTED or CHANGED: what became of the experts since."""
        return self.rewrite.experts.condition(module)


def install(module: nn.Module, rewrite: Rewrite, family: str, verified: bool) -> None:
    """Let compilers trace `rewrite` for `module`; plain calls, and training, still run the original code.

    While it is traced it asks whether the experts are still what was proven. With adapters or quantized weights they
    run by their own forward; changed in another way, the original code is traced.

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
    patches: dict[str, Installed] = {}
    for name, value in vars(module).items():
        note = getattr(value.__func__, "moeca", None) if isinstance(value, types.MethodType) else None
        if isinstance(note, Installed):
            patches[name] = note
    return patches


def replaced(module: nn.Module, name: str) -> bool:
    """Whether someone put another method of that name on the instance; the class's own code again doesn't count."""
    if name not in vars(module):
        return False
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in (vars(module)[name], getattr(type(module), name))]
    return len({code and (code.co_filename, code.co_firstlineno, code.co_code) for code in codes}) > 1


@dataclass(frozen=True)
class _Forms:
    """What a patched method chooses from, each time that it is traced."""

    experts: Experts
    canonical: Callable[..., Any]
    following: Callable[..., Any]
    original: Callable[..., Any]
    fits: Callable[..., bool] | None


# By the mark that the patched method's code carries. Read from here, and not from the method's closure, all modules of
# one class share the guards on it.
_FORMS: dict[str, _Forms] = {}


def _patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forms = _FORMS["mark"]
    if not torch.compiler.is_compiling() or self.training:
        return forms.original(self, *args, **kwargs)
    if forms.fits is not None and not forms.fits(args, kwargs):
        return forms.original(self, *args, **kwargs)
    condition = forms.experts.condition(self)
    if condition == SAME:
        return forms.canonical(self, *args, **kwargs)
    if condition == ADAPTED:
        return forms.following(self, *args, **kwargs)
    return forms.original(self, *args, **kwargs)


def _check_of(pins: tuple[Pin, ...]) -> Callable[..., bool] | None:
    """Whether a call is one that was proven; None: every call is."""
    return (lambda args, kwargs: all(pin.holds(args, kwargs) for pin in pins)) if pins else None


# Equal patches are one function: modules of one class then share one compiled graph.
@functools.lru_cache(maxsize=512)
def _method(original: Callable[..., Any], note: Installed) -> Callable[..., Any]:
    rewrite = note.rewrite
    # Dynamo keeps graphs and recompile counts on code objects: each patch needs one of its own.
    mark = f"moeca patch {next(_numbers)}"
    _FORMS[mark] = _Forms(
        rewrite.experts, rewrite.function(), rewrite.following().function(), original, _check_of(rewrite.pins)
    )
    constants = tuple(mark if constant == "mark" else constant for constant in _patched.__code__.co_consts)
    code = _patched.__code__.replace(co_consts=constants)
    method = types.FunctionType(code, _patched.__globals__, _patched.__name__)
    functools.update_wrapper(method, original)
    method.moeca = note  # type: ignore[attr-defined]
    return method
