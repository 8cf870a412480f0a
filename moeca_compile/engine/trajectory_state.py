"""The state of one trajectory of a handle: its clock, and for each compiled schedule the state of each stream."""

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
from moeca_compile.engine.hoisted import Hoisted, TimestepHistory, TimestepPlan
from moeca_compile.engine.probe import Probe
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.runtime.clock import MAX_STREAMS, CallObservation, Clock, Counter, StepPlacement
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.stats import MAX_RECORDS, MAX_TRAJECTORIES, StepRecord


@dataclass(slots=True)
class Stream:
    """State of one guidance stream: its cached outputs, and its hoisted values."""

    state: StreamState
    hoisted: Hoisted


@dataclass(slots=True)
class GraphState:
    """State of one compiled schedule in one trajectory.

    Attributes:
        kind: number of its input signature, in the order in which the trajectory met them.
        streams: by the clock's name or number of the stream.
        caches: addresses of the caches that calls came with, one for each guidance stream of a decoder.
    """

    kind: int
    streams: dict[Hashable, Stream] = field(default_factory=dict)
    caches: list[int] = field(default_factory=list)

    def kind_with(self, address: int) -> Hashable:
        """The kind of calls with the cache at this address. A cache that is another at every call tells nothing: past
        `MAX_STREAMS` addresses in a trajectory all calls are of one kind."""
        if address not in self.caches and len(self.caches) < MAX_STREAMS:
            self.caches.append(address)
        return self.kind, address if address in self.caches else None


class RecordHistory:
    """The records of a handle's trajectories since its last reset; no tensors."""

    def __init__(self) -> None:
        self._entries = deque[tuple[bool, deque[StepRecord]]](maxlen=MAX_TRAJECTORIES)
        self._lock = threading.Lock()  # trajectories of several threads are added

    def add(self, records: deque[StepRecord], exact: bool) -> None:
        """Add a trajectory, which may grow; one that is there already isn't added again. `exact`: the caller marks
        where it begins and ends."""
        with self._lock:
            if not any(records is present for _, present in self._entries):
                self._entries.append((exact, records))

    def clear(self) -> None:
        """Forget all trajectories."""
        with self._lock:
            self._entries.clear()

    def trajectories(self) -> list[list[StepRecord]]:
        """The records of each trajectory, in the order in which they began."""
        separated: list[list[StepRecord]] = []
        with self._lock:
            entries = list(self._entries)
        for exact, entry in entries:
            records, parts = list(entry), []
            while records:
                first = 0 if exact else start_of_last(records)
                parts.append(records[first:])
                del records[first:]
            separated += reversed(parts)
        return separated[-MAX_TRAJECTORIES:]


def start_of_last(records: Sequence[StepRecord]) -> int:
    """Where the last trajectory of the records begins. Consecutive calls whose timesteps move in one direction are one
    trajectory, even if the clock started anew in between."""
    first, direction, later = len(records), 0, None
    for i in reversed(range(len(records))):
        timestep = records[i].timestep
        if timestep is not None and later is not None and timestep != later:
            moved = 1 if later > timestep else -1
            if moved == -direction:
                break
            direction = moved
        first, later = i, later if timestep is None else timestep
    return first


class TrajectoryState:
    """State of one trajectory of a handle.

    The compiled schedules of a trajectory differ in their input signature, or are of models that take turns (two
    transformers, one for each range of timesteps). The signature may change during a
    trajectory: the clock goes on, and the state of another signature is kept for calls of that signature, where it
    serves the next step only.

    Args:
        trajectory: None: the state of all calls outside any trajectory.
        latent_jump: of the clock, for calls outside any trajectory.
        timestep_history: of the handle.
        history: the handle's records of its trajectories; those of this one are added.
        hands_over: a stream that continues in another model uses the state of the model before it.

    Attributes:
        exact: the caller marks where the trajectory begins and ends.
        counts: every call is the next step, and no input is read on the host.
        declared: the caller's timesteps for a named stream.
        by_schedule: state of each compiled schedule that has run.
        clock: finds step and stream of each call.
        probe: reads the inputs for the clock.
        timestep_plan: the timesteps that the trajectory has and will have.
        records: one for each call.
    """

    def __init__(
        self,
        trajectory: Trajectory | None = None,
        latent_jump: float = math.inf,
        timestep_history: TimestepHistory | None = None,
        history: RecordHistory | None = None,
        hands_over: bool = False,
    ) -> None:
        self.exact = trajectory is not None
        self.counts = trajectory is not None and trajectory.stream is not None
        self._new_clock = Counter if self.counts else partial(Clock, math.inf if self.exact else latent_jump)
        self.declared = None if trajectory is None else trajectory.declared()
        self.timestep_history = timestep_history or TimestepHistory()
        self.history = history or RecordHistory()
        self.by_schedule: weakref.WeakKeyDictionary[CompiledSchedule, GraphState] = weakref.WeakKeyDictionary()
        self.lock = threading.Lock()
        self._hands_over = hands_over
        self._kinds = itertools.count()
        self.reset()

    def of(self, compiled: CompiledSchedule) -> GraphState:
        """The state of a compiled schedule; empty at first."""
        graph = self.by_schedule.get(compiled)
        if graph is None:
            graph = self.by_schedule[compiled] = GraphState(next(self._kinds))
        return graph

    def stream(self, compiled: CompiledSchedule, graph: GraphState, name: Hashable, step: int) -> Stream:
        """Add a stream at its first call, number `step`. It is empty, or continues that of the model before it."""
        hoisted = Hoisted(self.timestep_plan, self.probe.contents.number, compiled.program.freeing)
        stream = graph.streams[name] = Stream(compiled.state(), hoisted)
        before = self._predecessor(compiled, graph, name, step) if self._hands_over else None
        if before is not None:
            stream.state, before.state = before.state, stream.state
        return stream

    def _predecessor(self, compiled: CompiledSchedule, graph: GraphState, name: Hashable, step: int) -> Stream | None:
        """The stream with the same conditioning that another model, which computes the same from other weights, had at
        the step before."""
        for other, its_graph in self.graphs():
            if its_graph is graph or other.program.key != compiled.program.key or other.layout != compiled.layout:
                continue
            for its_name, stream in its_graph.streams.items():
                if stream.state.last_step == step - 1 and self._condition(its_name) == self._condition(name):
                    return stream
        return None

    def _condition(self, name: Hashable) -> Hashable:
        if isinstance(self.clock, Clock) and isinstance(name, int):
            return self.clock.streams[name][1]
        return name

    def drop_useless(self, step: int) -> None:
        """Release the state of other graphs that is too old for call `step`: kept outputs serve the next step only."""
        for _, graph in self.graphs():
            for stream in graph.streams.values():
                if -1 < stream.state.last_step < step - 1:
                    stream.state.clear()

    def graphs(self) -> list[tuple[CompiledSchedule, GraphState]]:
        """The compiled schedules that have run, each with its state."""
        return list(self.by_schedule.items())

    def forget(self) -> None:
        """Drop all state: the next call of each stream is cold. The clock goes on."""
        for _, graph in self.graphs():
            graph.streams.clear()

    def miss(self) -> None:
        """Count a call that ran no graph: its step is missing from the state, so the next step is cold."""
        self.forget()
        self.clock.miss()

    def reset(self) -> None:
        """Drop everything: the next call is the first of a trajectory."""
        self.forget()
        self.clock: Clock | Counter = self._new_clock()
        self.probe = Probe()
        self.timestep_plan = TimestepPlan(history=self.timestep_history)
        self.records = deque[StepRecord](maxlen=MAX_RECORDS)

    def begin(self, placement: StepPlacement, observation: CallObservation, timesteps: Sequence[float]) -> None:
        """Begin a trajectory with this call. `timesteps`: those it will have; empty: the last trajectory's."""
        self.forget()
        for _, graph in self.graphs():
            graph.caches = [address for address in graph.caches if (graph.kind, address) == observation.kind]
        self.probe.start(observation.kind, observation.condition)
        self.timestep_plan = TimestepPlan(tuple(timesteps or self.timestep_history.last), self.timestep_history)
        if not (self.exact or placement.broken_off):
            self.records = deque(maxlen=MAX_RECORDS)
        self.history.add(self.records, self.exact)

    def last_trajectory(self) -> list[StepRecord]:
        """The calls of the last trajectory."""
        records = list(self.records)
        return records if self.exact else records[start_of_last(records) :]
