"""Calls in progress: whose they are, and one at a time in Dynamo for each compiled handle.

A backend is never told which compiled model is calling; but it is on the Python stack while its graph runs.

Dynamo's guards keep state while they are checked, and a call that waited while another one compiled compiles again. So
where threads call one handle, Dynamo finds that no graph fits where one does, and makes another of the same; after some
of these it runs the model eagerly. A hook that torch runs around each call closes a gate until the first graph runs.
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

from moeca_compile.engine.trajectories.blocks import current
from moeca_compile.engine.trajectories.trajectory import RAN_EAGERLY
from moeca_compile.frontend.graph_breaks import GraphBreak, break_after
from moeca_compile.frontend.owner import WRAPPER, modules_of, parameters_of
from moeca_compile.runtime.warned import Warned

MAX_GRAPHS = 64
_gates: weakref.WeakSet[Gate] = weakref.WeakSet()


class Owner(NamedTuple):
    """A call in progress. `handle`: torch's compile context; `function`: what it compiles; `frame`: the call's."""

    handle: Any
    function: Callable[..., Any]
    frame: FrameType

    @property
    def modules(self) -> tuple[Module, ...]:
        """The models whose code this runs."""
        return modules_of(self.function)


def find_owner() -> Owner | None:
    """The innermost call of something compiled; None outside any."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not WRAPPER:
        frame = frame.f_back
    if frame is None:
        return None
    names = frame.f_locals
    return Owner(names["self"], names["fn"], frame)


class Gate:
    """The hook of one handle."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a first call makes another one inside itself
        self.graphs = 0
        self.unseen = 0  # calls that ran no graph of ours
        self.warned = Warned()  # what the user of this handle was told
        self.raised: Callable[[], Callable[[], None]] | None = None
        _gates.add(self)

    def __call__(self) -> Callable[[], None]:
        self.lock.acquire()
        CALLS.last = call = Call(self, CALLS.last)
        if self.raised is not None:
            call.restore = self.raised()
        return call.end

    def count(self) -> None:
        """Dynamo made a graph for this handle. Its limit is for code whose graphs hardly differ; here each kind of call
        has one, and beyond the limit nothing would be cached. So it is raised for handles that come near to it."""
        self.graphs += 1
        if self.graphs >= config.recompile_limit - 1 and self.raised is None:
            limit = max(MAX_GRAPHS, config.recompile_limit)
            self.raised = config._make_closure_patcher(recompile_limit=limit)

    def __deepcopy__(self, memo: object) -> Gate:
        return Gate()

    def __reduce__(self) -> tuple[Callable[[], Gate], tuple[()]]:
        return Gate, ()


class Call:
    """A call in progress, before (`waits`) or after its first graph began to run; `finishes`: its model was prepared
    meanwhile, so that its graphs are out of date. `parts`: how many graphs of a broken model it has run, and `breaks`
    between them; `tell` is called with both when it ends."""

    __slots__ = ("breaks", "finishes", "gate", "outer", "parts", "restore", "tell", "waits")

    def __init__(self, gate: Gate, outer: Call | None) -> None:
        self.gate, self.outer, self.waits, self.finishes = gate, outer, True, False
        self.restore: Callable[[], None] | None = None
        self.parts = 0
        self.breaks: list[GraphBreak] = []
        self.tell: Callable[[int, list[GraphBreak]], None] | None = None

    def ran_part(self, graph: GraphModule, tell: Callable[[int, list[GraphBreak]], None]) -> None:
        """A graph of a broken model runs."""
        self.parts, self.tell = self.parts + 1, tell
        found = break_after(graph)
        if found is not None and found not in self.breaks:
            self.breaks.append(found)

    def passes(self) -> None:
        """Dynamo is done with this call, for now."""
        if self.waits:
            self.waits = False
            self.gate.lock.release()

    def end(self) -> None:
        CALLS.last = self.outer
        if self.restore is not None:
            self.restore()
        if sys.exc_info()[0] is None:
            if self.waits:
                self.gate.unseen += 1
                _tell(self.gate)
            elif self.tell is not None and not self.finishes:
                self.tell(self.parts, self.breaks)
        if self.waits:
            self.passes()


class _Calls(threading.local):
    last: Call | None = None  # this thread's innermost


CALLS = _Calls()


def call_of(context: Any) -> Call | None:
    """This thread's call of a handle; None: it began before the handle had a gate, with its very first calls."""
    call = CALLS.last
    return call if call is not None and call.gate in context.enter_exit_hooks else None


def _tell(gate: Gate) -> None:
    """No graph ran in a call that ends: its trajectory says so when it is left, and a call outside any says so now."""
    owner = find_owner()
    weights = frozenset(map(id, parameters_of(owner.function))) if owner is not None else frozenset[int]()
    trajectory = current(weights, owner.frame if owner is not None else None)
    if trajectory is not None:
        trajectory.miss(gate.unseen == 1)
    else:
        gate.warned.once(f"a call of the compiled model {RAN_EAGERLY}")


def gate_of(context: Any) -> Gate:
    """The gate of a handle, by torch's compile context; put there if it has none."""
    hooks: list[Any] = context.enter_exit_hooks
    found = next((hook for hook in hooks if isinstance(hook, Gate)), None)
    if found is None:
        found = Gate()
        hooks.append(found)
    return found


def _renew_locks() -> None:
    for gate in _gates:
        gate.lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)  # who held them isn't there any more
