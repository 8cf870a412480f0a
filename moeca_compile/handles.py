"""Compiled handles, each with all that belongs to it: options as they were read, programs, state, warnings.

A handle is what `torch.compile` gave: a module, a function, or the module that was compiled in place. Each of them has
a compile context of its own; what belongs to the handle is found by that, and goes with it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch._dynamo import eval_frame
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

from moeca_compile.bank import Bank
from moeca_compile.options import Options
from moeca_compile.owner import Owner, parameters_of
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Schedule

Read = tuple[Options, Schedule]  # the schedule as its file, or short form, said when it was read

_STATES: dict[int, HandleState] = {}  # by id of the compile context
_ALL: weakref.WeakSet[HandleState] = weakref.WeakSet()  # and those of callers that have none
_making = threading.Lock()

_WRAPPER = next(
    code
    for code in eval_frame._TorchDynamoContext.__call__.__code__.co_consts
    if isinstance(code, CodeType) and code.co_name in ("compile_wrapper", "_fn")
)


class HandleState:
    """What belongs to one handle.

    Attributes:
        context: the compile context (a weak reference); None where the callable was called without torch.compile.
        lock: around all containers below; held for moments only.
    """

    def __init__(self, context: object | None, options: Options, schedule: Schedule) -> None:
        self.context = None if context is None else weakref.ref(context, _forget(id(context)))
        self.options, self.schedule = options, schedule
        self.lock = threading.RLock()
        self.warned = Warned()
        self._banks: dict[int | None, Bank] = {}  # by the number of the part's graph; None: the whole model
        _ALL.add(self)

    def bank(self, owner: Owner | None, part: int | None) -> Bank:
        """Of the whole model (`part` None), or of one part of a broken graph."""
        found = self._banks.get(part)
        if found is None:
            with self.lock:
                handle = None if owner is None else owner.handle
                made = Bank(handle, self.options, self.schedule, self.warned, self.lock)
                found = self._banks.setdefault(part, made)
        return found

    def banks(self) -> list[Bank]:
        with self.lock:
            return list(self._banks.values())


def state_of(context: Any, read: Callable[[Any], Read]) -> HandleState:
    """The state of a compile context; made, with the options that `read` finds, when it is first asked for."""
    state = _STATES.get(id(context))
    if state is None or state.context is None or state.context() is not context:
        options, schedule = read(context)
        with _making:
            state = _STATES.get(id(context))
            if state is None or state.context is None or state.context() is not context:
                state = _STATES[id(context)] = HandleState(context, options, schedule)
    return state


def _forget(key: int) -> Callable[[object], None]:
    """Drop the state of a context that is gone, unless its address has been used again."""

    def forget(ref: object) -> None:
        state = _STATES.get(key)
        if state is not None and state.context is ref:
            del _STATES[key]

    return forget


def states_of(model: Any) -> list[HandleState]:
    """Those of a handle; of a plain module, those of all handles that run it; of a function that torch knows nothing
    of, those without a handle."""
    context = context_of(model)
    if context is not None:
        return [state for state in (_STATES.get(id(context)),) if state is not None]
    weights = {id(weight) for weight in parameters_of(model)}
    found = []
    for state in list(_ALL):
        ids = frozenset[int]().union(*(bank.ids for bank in state.banks()))
        if not weights.isdisjoint(ids) or (not weights and state.context is None):
            found.append(state)
    return found


def all_states() -> Iterator[HandleState]:
    return iter(list(_ALL))


def calling(owner: Owner | None) -> Any:
    """The compile context of the call in progress; None: there is none."""
    if owner is not None:
        return context_of(owner.handle)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _WRAPPER:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def context_of(compiled: object) -> Any:
    """The compile context of what `torch.compile` gave, or of a module compiled in place; None: it isn't compiled."""
    if isinstance(compiled, OptimizedModule):
        return compiled.dynamo_ctx
    if isinstance(compiled, torch.nn.Module):
        call = compiled._compiled_call_impl
        return context_of(getattr(call, "call", call))
    if isinstance(compiled, FunctionType) and compiled.__code__ is _WRAPPER and compiled.__closure__:
        return compiled.__closure__[_WRAPPER.co_freevars.index("self")].cell_contents
    return None


def backend_of(context: Any) -> Any:
    """What `torch.compile` was told to compile with: torch's wrapper around it, with its options."""
    return innermost_backend(context.callback)
