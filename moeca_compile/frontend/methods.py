"""Installs the methods of a model that call its `forward` on the compiled module.

torch looks up a method such as `forward_with_cfg` on the original model, whose `self.forward` isn't compiled. So the
compiled module gets such methods itself. They run as written, with the compiled module as `self`.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import weakref
from itertools import pairwise
from types import FunctionType
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule


def route_methods(handle: OptimizedModule) -> None:
    """Give the handle the methods of its model's class that call the model."""
    methods: dict[str, FunctionType] = {}
    for cls in reversed(type(handle._orig_mod).__mro__):
        if cls not in nn.Module.__mro__:
            methods |= {name: value for name, value in vars(cls).items() if isinstance(value, FunctionType)}
    handle.__dict__.update({name: _bound(methods[name], handle) for name in _callers(methods)})


def _callers(methods: dict[str, FunctionType]) -> set[str]:
    """Names of the methods that call `self.forward(...)`, `self(...)` or another such method. A method with `super()`
    is left out, for it needs the original model as `self`."""
    calls: dict[str, set[str]] = {}
    for name, method in methods.items():
        if name != "forward" and not name.startswith("__") and "__class__" not in _code(method).co_freevars:
            calls[name] = called_on_self(method)
    callers: set[str] = set()
    while True:
        more = {name for name, called in calls.items() if called & (callers | {"forward", "__call__"})} - callers
        if not more:
            return callers
        callers |= more


def called_on_self(method: FunctionType) -> set[str]:
    """Names that a method loads from its first argument, with `__call__` if it calls that argument itself."""
    code = _code(method)
    if not code.co_argcount:
        return set()
    self_name = code.co_varnames[0]
    pairs = list(pairwise(dis.get_instructions(code)))
    names = {b.argval for a, b in pairs if _loads(a, self_name) and b.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    if sys.version_info >= (3, 13):  # PUSH_NULL comes after the callable
        calls_self = any(_loads(a, self_name) and b.opname == "PUSH_NULL" for a, b in pairs)
    else:
        calls_self = any(a.opname == "PUSH_NULL" and _loads(b, self_name) for a, b in pairs)
    return names | {"__call__"} if calls_self else names


def _loads(instruction: dis.Instruction, name: str) -> bool:
    if not instruction.opname.startswith("LOAD_FAST"):  # a constant may be any tuple, () too
        return False
    value = instruction.argval
    return bool((value[-1] if isinstance(value, tuple) else value) == name)  # some instructions load two variables


def _code(method: FunctionType) -> Any:
    return inspect.unwrap(method).__code__


def _bound(method: FunctionType, handle: OptimizedModule) -> Any:
    """A bound method that holds its handle by a weak reference, so that the handle can be collected."""
    handle_ref = weakref.ref(handle)

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        return method(handle_ref(), *args, **kwargs)

    return run
