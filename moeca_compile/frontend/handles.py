"""The state of each compiled handle: options as they were read, programs, trajectories, warnings.

A handle is what `torch.compile` returned (a module or a function), or a module that was compiled in place. Each handle
has a compile context of its own. Its state is found by that context, and is dropped with it.
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
from moeca_compile.engine.packages import LoadedModel
from moeca_compile.frontend.calls import gate_of
from moeca_compile.frontend.graph_breaks import GraphBreak, describe
from moeca_compile.frontend.owner import handle_of, parameters_of
from moeca_compile.graph.regions import Rejected
from moeca_compile.options import Options
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Schedule

Read = tuple[Options, Schedule]  # options, and the schedule as its file or short form was when it was read

STATES: dict[int, HandleState] = {}  # by id of the compile context
_ALL: weakref.WeakSet[HandleState] = weakref.WeakSet()  # also those of callers without a compile context
_making = threading.Lock()


@dataclass(eq=False, slots=True)
class FirstCalls:
    """What the first calls of a handle record for later ones; the model is prepared in them.

    Attributes:
        retraced: the model was called again after it was prepared; a graph break from now on is accepted.
        trial: during such a call, whether a graph of the full model has run; else None.
        outdated: calls without a gate whose graphs are of the unprepared model, by thread and frame.
        rejected: expert dispatches that `prepare` left alone.
        hooked: a module with a hook.
    """

    retraced: bool = False
    trial: bool | None = None
    outdated: set[tuple[int, int]] = field(default_factory=set)
    rejected: tuple[Rejected, ...] = ()
    hooked: weakref.ref[Module] | None = None


class HandleState:
    """The state of one handle.

    Attributes:
        context: the compile context (a weak reference); None: a call without torch.compile.
        options, schedule: as they were read for the handle.
        lock: protects the containers of `runtime`; held briefly.
        warned: counts the handle's warnings.
        runtime: programs, weights and trajectories.
        first: what the first calls recorded.
        is_full_model: by number of a graph, whether it is the full model and not a part of a broken one.
        parts: number of graphs that the last broken call ran; 0: no graph break.
        uncached: where and why calls run uncached, and the remedy; "": they are cached.
        announced: regions and schedules whose summary was logged.
    """

    def __init__(self, context: object | None, options: Options, schedule: Schedule) -> None:
        self.context = None if context is None else weakref.ref(context, _forget(id(context)))
        self.options, self.schedule = options, schedule
        self.lock = threading.RLock()
        self.warned = Warned() if context is None else gate_of(context).warned
        self.first, self.is_full_model = FirstCalls(), dict[int, bool]()
        trajectories = None if context is None else getattr(_compiler_of(context), "trajectories", None)
        self.runtime = HandleRuntime(context, options, schedule, self.warned, self.lock, trajectories)
        if context is not None and options.free_hoisted:
            gate_of(context).freed = self.runtime.freed
        self.parts, self.uncached = 0, ""
        self.announced: set[object] = set()
        _ALL.add(self)

    def report_breaks(self, parts: int, breaks: Sequence[GraphBreak], dispatches: Sequence[object]) -> None:
        """Record and warn that a call ran in parts."""
        self.parts, self.uncached = parts, describe(parts, breaks, dispatches)
        self.warned.once(self.uncached, "graph break")

    def report_uncached(self, reason: str) -> None:
        """Record and warn that the full model's graph runs uncached."""
        self.uncached = f"the model runs uncached, as plain torch.compile runs it: {reason}"
        self.warned.once(self.uncached, "uncached")


def state_of(context: Any, read: Callable[[Any], Read]) -> HandleState:
    """The state of a compile context; made on first use, with the options that `read` returns."""
    state = STATES.get(id(context))
    if state is None or state.context is None or state.context() is not context:
        options, schedule = read(context)
        with _making:
            state = STATES.get(id(context))
            if state is None or state.context is None or state.context() is not context:
                state = STATES[id(context)] = HandleState(context, options, schedule)
    return state


def _forget(key: int) -> Callable[[object], None]:
    """A callback that drops the state of a collected context, unless a new context has the same address."""

    def forget(ref: object) -> None:
        state = STATES.get(key)
        if state is not None and state.context is ref:
            del STATES[key]
            state.runtime.freed.restore()

    return forget


def states_of(model: Any) -> list[HandleState]:
    """The states of a handle. For a plain module: those of all handles that run it. For a function that isn't compiled:
    those without a compile context."""
    context = handle_of(model)
    if context is not None:
        state = STATES.get(id(context))
        return [] if state is None else [state]
    weights = {id(weight) for weight in parameters_of(model)}
    if not weights:
        return [state for state in list(_ALL) if state.context is None]
    return [state for state in list(_ALL) if not weights.isdisjoint(state.runtime.ids)]


def runs_of(model: Any) -> list[HandleState | LoadedModel]:
    """What holds the trajectories of a model: the loaded package itself, or the states of a handle."""
    return [model] if isinstance(model, LoadedModel) else [*states_of(model)]


def all_states() -> Iterator[HandleState]:
    return iter(list(_ALL))


def _compiler_of(context: Any) -> Any:
    """The backend itself."""
    compiled = backend_of(context)
    return getattr(compiled, "compiler_fn", compiled)


def backend_of(context: Any) -> Any:
    """The backend of a compile context: torch's wrapper around it, with its options."""
    return innermost_backend(context.callback)
