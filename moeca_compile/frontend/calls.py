"""Calls in progress: finds the calling handle, and lets one call of each handle at a time into Dynamo.

torch doesn't tell a backend which compiled model is calling. The model's wrapper is on the Python stack while its graph
runs.

Dynamo's guards aren't safe for threads: when threads call one handle, Dynamo may miss a graph that fits, compile
the same graph again, and after some recompilations run the model eagerly. So torch runs a hook of ours around each
call, which holds a lock until the call's first graph runs.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from torch._dynamo import config
from torch.fx import GraphModule
from torch.nn import Module

from moeca_compile.engine.freeing.weights import FreedWeights
from moeca_compile.engine.trajectories.blocks import current
from moeca_compile.engine.trajectories.trajectory import RAN_EAGERLY
from moeca_compile.frontend.graph_breaks import GraphBreak, break_after
from moeca_compile.frontend.owner import WRAPPER, modules_of, parameters_of
from moeca_compile.runtime.warned import Warned

MAX_GRAPHS = 64
_gates: weakref.WeakSet[Gate] = weakref.WeakSet()


class Owner(NamedTuple):
    """The compiled handle that is calling.

    Attributes:
        handle: torch's compile context.
        function: what was compiled.
        frame: of torch's wrapper around the call.
    """

    handle: Any
    function: Callable[..., Any]
    frame: FrameType

    @property
    def modules(self) -> tuple[Module, ...]:
        """The models that the function runs."""
        return modules_of(self.function)


def find_owner() -> Owner | None:
    """The innermost compiled call on the stack; None: there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not WRAPPER:
        frame = frame.f_back
    if frame is None:
        return None
    names = frame.f_locals
    return Owner(names["self"], names["fn"], frame)


class Gate:
    """The hook around the calls of one handle.

    Attributes:
        lock: held by a call until its first graph runs.
        graphs: number of graphs that Dynamo made for the handle.
        uncached_calls: number of calls that ran no graph of this backend.
        covered: whether the handle's calls are cached even if they run no graph.
        warned: counts the handle's warnings.
        freed: weights of the handle that were freed; None: none will be.
        raise_limit: raises Dynamo's recompile limit during a call; None: the limit stays.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant: a first call calls the model again
        self.graphs = 0
        self.uncached_calls = 0
        self.covered = False
        self.warned = Warned()
        self.raise_limit: Callable[[], Callable[[], None]] | None = None
        self.freed: FreedWeights | None = None
        _gates.add(self)

    def __call__(self) -> Callable[[], None]:
        self.lock.acquire()
        CALLS.last = call = Call(self, CALLS.last)
        if self.raise_limit is not None:
            call.restore = self.raise_limit()
        if self.freed is not None:
            call.freed = self.freed
            call.freed.enter()
        return call.end

    def count(self) -> None:
        """Count a graph that Dynamo made for this handle, and raise Dynamo's limit for a handle that comes near to it.
        Each kind of call has its own graph, and past the limit nothing would be cached."""
        self.graphs += 1
        if self.graphs >= config.recompile_limit - 1 and self.raise_limit is None:
            limit = max(MAX_GRAPHS, config.recompile_limit)
            self.raise_limit = config._make_closure_patcher(recompile_limit=limit)

    def __reduce__(self) -> tuple[Callable[[], Gate], tuple[()]]:
        return Gate, ()


class Call:
    """A call in progress.

    Attributes:
        gate: of the handle.
        outer: the call around this one, in the same thread.
        holds_gate: no graph of the call has run yet.
        is_outdated: the model was prepared during the call, so that the call's graphs are of the unprepared model.
        parts: number of graphs of a broken model that the call has run.
        breaks: the graph breaks between them.
        report: called with both when the call ends; None: the graph isn't broken.
        restore: restores Dynamo's recompile limit.
        freed: freed weights, which hold their stand-ins until the call ends.
    """

    __slots__ = ("breaks", "freed", "gate", "holds_gate", "is_outdated", "outer", "parts", "report", "restore")

    def __init__(self, gate: Gate, outer: Call | None) -> None:
        self.gate, self.outer, self.holds_gate, self.is_outdated = gate, outer, True, False
        self.restore: Callable[[], None] | None = None
        self.freed: FreedWeights | None = None
        self.parts = 0
        self.breaks: list[GraphBreak] = []
        self.report: Callable[[int, list[GraphBreak]], None] | None = None

    def ran_part(self, graph: GraphModule, report: Callable[[int, list[GraphBreak]], None]) -> None:
        """Count a graph of a broken model."""
        self.parts, self.report = self.parts + 1, report
        graph_break = break_after(graph)
        if graph_break is not None and graph_break not in self.breaks:
            self.breaks.append(graph_break)

    def release_gate(self) -> None:
        """Let the next call into Dynamo."""
        if self.holds_gate:
            self.holds_gate = False
            self.gate.lock.release()

    def end(self) -> None:
        """Leave the call; torch calls this when the call returns or raises."""
        CALLS.last = self.outer
        if self.restore is not None:
            self.restore()
        if self.freed is not None:
            self.freed.leave()
        if sys.exc_info()[0] is None:
            if self.holds_gate and not self.gate.covered:
                self.gate.uncached_calls += 1
                _report_uncached(self.gate)
            elif self.report is not None and not self.is_outdated:
                self.report(self.parts, self.breaks)
        if self.holds_gate:
            self.release_gate()


class _Calls(threading.local):
    last: Call | None = None  # the innermost call of this thread


CALLS = _Calls()


def call_of(context: Any) -> Call | None:
    """This thread's call of a handle; None: the call began before the handle had a gate, as first calls may."""
    call = CALLS.last
    return call if call is not None and call.gate in context.enter_exit_hooks else None


def _report_uncached(gate: Gate) -> None:
    """Report a call that ran no graph. Its trajectory warns when it is left; a call outside any warns now."""
    owner = find_owner()
    weights = frozenset(map(id, parameters_of(owner.function))) if owner is not None else frozenset[int]()
    trajectory = current(weights, owner.frame if owner is not None else None)
    if trajectory is not None:
        trajectory.miss(gate.uncached_calls == 1)
    else:
        gate.warned.once(f"a call of the compiled model {RAN_EAGERLY}")


def gate_of(context: Any) -> Gate:
    """The gate of a handle, by torch's compile context; installed on first use."""
    hooks: list[Any] = context.enter_exit_hooks
    for hook in hooks:
        if isinstance(hook, Gate):
            return hook
    gate = Gate()
    hooks.append(gate)
    return gate


def _renew_locks() -> None:
    for gate in _gates:
        gate.lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)  # the threads that held the locks don't exist in the child
