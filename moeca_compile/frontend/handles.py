"""Compiled handles, each with all that belongs to it: options as they were read, programs, state, warnings.

A handle is what `torch.compile` gave: a module, a function, or the module that was compiled in place. Each of them has
a compile context of its own; what belongs to the handle is found by that, and goes with it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch._dynamo.eval_frame import innermost_backend
from torch.nn import Module

from moeca_compile.engine.handle_runtime import HandleRuntime
from moeca_compile.frontend.calls import gate_of
from moeca_compile.frontend.graph_breaks import GraphBreak, in_words
from moeca_compile.frontend.owner import handle_of, parameters_of
from moeca_compile.graph.regions import Rejected
from moeca_compile.options import Options
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Schedule

Read = tuple[Options, Schedule]  # the schedule as its file, or short form, said when it was read

STATES: dict[int, HandleState] = {}  # by id of the compile context
_ALL: weakref.WeakSet[HandleState] = weakref.WeakSet()  # and those of callers that have none
_making = threading.Lock()


@dataclass(eq=False, slots=True)
class FirstCalls:
    """What the first calls of a handle, in which its model is prepared, leave for later ones.

    Attributes:
        renewed: the model was called once more; if its graph breaks then, so be it.
        trial: while it is called once more, whether its graph was whole; else None.
        finishing: calls without a gate that only have to finish, by thread and frame.
        left: expert dispatches that were left alone.
        hooked: a module with a hook.
    """

    renewed: bool = False
    trial: bool | None = None
    finishing: set[tuple[int, int]] = field(default_factory=set)
    left: tuple[Rejected, ...] = ()
    hooked: weakref.ref[Module] | None = None


class HandleState:
    """What belongs to one handle.

    Attributes:
        context: the compile context (a weak reference); None where the callable was called without torch.compile.
        lock: around all containers below; held for moments only.
        runtime: its programs, weights and trajectories.
        first: how its model was prepared.
        whole: by number of a graph, whether it is the whole model; handles of one class share the parts of broken ones.
        parts: how many graphs the last broken call ran; 0: its graph didn't break.
        uncached: where and why calls run uncached, and what helps; "" where they are cached.
    """

    def __init__(self, context: object | None, options: Options, schedule: Schedule) -> None:
        self.context = None if context is None else weakref.ref(context, _forget(id(context)))
        self.options, self.schedule = options, schedule
        self.lock = threading.RLock()
        self.warned = Warned() if context is None else gate_of(context).warned
        self.first, self.whole = FirstCalls(), dict[int, bool]()
        self.runtime = HandleRuntime(context, options, schedule, self.warned, self.lock)
        self.parts, self.uncached = 0, ""
        _ALL.add(self)

    def is_broken(self, parts: int, breaks: Sequence[GraphBreak], dispatches: Sequence[object]) -> None:
        """A call ran in parts: say so once."""
        self.parts, self.uncached = parts, in_words(parts, breaks, dispatches)
        self.warned.once(self.uncached, "graph break")

    def is_refused(self, reason: str) -> None:
        """A whole graph isn't cached for this reason: say so once."""
        self.uncached = f"the model runs uncached, as plain torch.compile runs it: {reason}"
        self.warned.once(self.uncached, "uncached")


def state_of(context: Any, read: Callable[[Any], Read]) -> HandleState:
    """The state of a compile context; made, with the options that `read` finds, when it is first asked for."""
    state = STATES.get(id(context))
    if state is None or state.context is None or state.context() is not context:
        options, schedule = read(context)
        with _making:
            state = STATES.get(id(context))
            if state is None or state.context is None or state.context() is not context:
                state = STATES[id(context)] = HandleState(context, options, schedule)
    return state


def _forget(key: int) -> Callable[[object], None]:
    """Drop the state of a context that is gone, unless its address has been used again."""

    def forget(ref: object) -> None:
        state = STATES.get(key)
        if state is not None and state.context is ref:
            del STATES[key]

    return forget


def states_of(model: Any) -> list[HandleState]:
    """Those of a handle; of a plain module, those of all handles that run it; of a function that torch knows nothing
    of, those without a handle."""
    context = handle_of(model)
    if context is not None:
        return [state for state in (STATES.get(id(context)),) if state is not None]
    weights = {id(weight) for weight in parameters_of(model)}
    return [
        state
        for state in list(_ALL)
        if not weights.isdisjoint(state.runtime.ids) or (not weights and state.context is None)
    ]


def all_states() -> Iterator[HandleState]:
    return iter(list(_ALL))


def backend_of(context: Any) -> Any:
    """What `torch.compile` was told to compile with: torch's wrapper around it, with its options."""
    return innermost_backend(context.callback)
