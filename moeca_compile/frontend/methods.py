"""Methods of a model that call its `forward`, on what torch.compile gave for the model.

torch looks a method such as `forward_with_cfg` up on the original model, whose `self.forward` isn't the compiled one.
So the compiled module gets such methods itself: they run as written, with the compiled module as `self`.
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
    known = {
        name: method
        for kind in reversed(type(handle._orig_mod).__mro__)
        if kind not in nn.Module.__mro__
        for name, method in vars(kind).items()
        if isinstance(method, FunctionType)
    }
    handle.__dict__.update({name: _bound(known[name], handle) for name in _callers(known)})


def _callers(known: dict[str, FunctionType]) -> set[str]:
    """Those that call `self.forward(...)`, `self(...)` or another one that does. One that says `super()` needs the
    original model as `self`."""
    calls = {
        name: called_on_self(method)
        for name, method in known.items()
        if name != "forward" and not name.startswith("__") and "__class__" not in _code(method).co_freevars
    }
    found: set[str] = set()
    while True:
        more = {name for name, called in calls.items() if called & (found | {"forward", "__call__"})} - found
        if not more:
            return found
        found |= more


def called_on_self(method: FunctionType) -> set[str]:
    """Names that a method loads from its first argument; `__call__` where it calls that itself."""
    code = _code(method)
    if not code.co_argcount:
        return set()
    mine = code.co_varnames[0]
    steps = list(dis.get_instructions(code))
    pairs = list(pairwise(steps))
    found = {b.argval for a, b in pairs if _loads(a, mine) and b.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    if sys.version_info >= (3, 13):  # the mark of a call comes after what is called
        called = any(_loads(a, mine) and b.opname == "PUSH_NULL" for a, b in pairs)
    else:
        called = any(a.opname == "PUSH_NULL" and _loads(b, mine) for a, b in pairs)
    return found | {"__call__"} if called else found


def _loads(step: dis.Instruction, name: str) -> bool:
    return step.opname.startswith("LOAD_FAST") and (
        step.argval == name or (isinstance(step.argval, tuple) and step.argval[-1] == name)
    )


def _code(method: FunctionType) -> Any:
    return inspect.unwrap(method).__code__


def _bound(method: FunctionType, handle: OptimizedModule) -> Any:
    """A bound method, but for a handle that can go while its methods are still on it."""
    itself = weakref.ref(handle)

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        return method(itself(), *args, **kwargs)

    return run
