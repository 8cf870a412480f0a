"""One trajectory of a handle while it runs: its clock, and for each compiled schedule the state of each stream."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.engine.hoisted import Ahead, Hoisted, Past
from moeca_compile.engine.probe import Probe
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.runtime.clock import CallObservation, Clock, Counter, StepPlacement
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.stats import MAX_RECORDS, StepRecord


@dataclass(slots=True)
class Stream:
    """What one guidance stream keeps: its cache, and its hoisted values."""

    state: StreamState
    hoisted: Hoisted


@dataclass(slots=True)
class GraphState:
    """The state of one compiled schedule in one trajectory. `kind`: which of the trajectory's input signatures it
    serves, by the order in which they came."""

    kind: int
    streams: dict[Hashable, Stream] = field(default_factory=dict)


class TrajectoryState:
    """State of one trajectory of a handle.

    Its schedules differ in the input signature. A trajectory may change it on its way: its clock goes on, and what
    was kept under another signature serves that one alone, and only at the step after.

    Args:
        trajectory: None: all calls outside any.
        latent_jump: the clock's, for calls outside any trajectory.

    Attributes:
        exact: the caller says where it begins and ends.
        counts: every call is the next step, and nothing is read from it.
        declared: the timesteps that the caller told of a stream on an accelerator.
        by_schedule: the state of each schedule that has run.
    """

    def __init__(
        self, trajectory: Trajectory | None = None, latent_jump: float = math.inf, past: Past | None = None
    ) -> None:
        self.exact = trajectory is not None
        self.counts = trajectory is not None and trajectory.stream is not None
        self._clock = Counter if self.counts else partial(Clock, math.inf if self.exact else latent_jump)
        self.declared = None if trajectory is None else trajectory.told()
        self.past = past or Past()
        self.by_schedule: weakref.WeakKeyDictionary[CompiledSchedule, GraphState] = weakref.WeakKeyDictionary()
        self.lock = threading.Lock()
        self._kinds = itertools.count()
        self.reset()

    def of(self, compiled: CompiledSchedule) -> GraphState:
        """Its state here; empty at first."""
        graph = self.by_schedule.get(compiled)
        if graph is None:
            graph = self.by_schedule[compiled] = GraphState(next(self._kinds))
        return graph

    def stream(self, compiled: CompiledSchedule, graph: GraphState, name: Hashable) -> Stream:
        """A new stream, empty."""
        made = graph.streams[name] = Stream(compiled.state(), Hoisted(self.ahead, self.probe.contents.number))
        return made

    def graphs(self) -> list[tuple[CompiledSchedule, GraphState]]:
        """Those that have run, each with its state."""
        return list(self.by_schedule.items())

    def forget(self) -> None:
        """Drop all state: the next call of each stream is cold. The clock goes on."""
        for _, graph in self.graphs():
            graph.streams.clear()

    def miss(self) -> None:
        """A call came that ran no graph: the stream missed a step, so its next one is cold."""
        self.forget()
        self.clock.miss()

    def reset(self) -> None:
        """Forget everything: the next call is the first."""
        self.forget()
        self.clock: Clock | Counter = self._clock()
        self.probe = Probe()
        self.ahead = Ahead(past=self.past)
        self.records: deque[StepRecord] = deque(maxlen=MAX_RECORDS)

    def begin(self, placement: StepPlacement, observation: CallObservation, timesteps: Sequence[float]) -> None:
        """A trajectory starts; `timesteps`: those that it will have, if they are known."""
        self.forget()
        self.probe.start(observation.kind, observation.condition)
        self.ahead = Ahead(tuple(timesteps or self.past.walked), self.past)
        if not (self.exact or placement.broken_off):
            self.records.clear()

    def shown(self) -> list[StepRecord]:
        """The calls of the last trajectory. Where nobody says when one begins, calls whose timesteps move in one
        direction are of one, even if the clock lost it on the way."""
        records = list(self.records)
        if self.exact:
            return records
        first, direction, later = len(records), 0, None
        for i, now in reversed([(i, record.timestep) for i, record in enumerate(records)]):
            if now is not None and later is not None and now != later:
                moved = 1 if later > now else -1
                if moved == -direction:
                    break
                direction = moved
            first, later = i, later if now is None else now
        return records[first:]
