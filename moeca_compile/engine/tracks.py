"""One trajectory of a handle while it runs: its clock, and the state of each program in it, by stream."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from moeca_compile.engine.hoisted import Ahead, HasPrologues, Hoisted
from moeca_compile.engine.probe import Probe
from moeca_compile.engine.trajectory import Trajectory
from moeca_compile.graph.nowait import Flag, upload
from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.runtime.clock import CallObservation, Clock, Counter, StepPlacement
from moeca_compile.runtime.state import Coefficients, StreamState
from moeca_compile.runtime.stats import StepRecord
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Row, Schedule

MAX_RECORDS = 4096
MAX_TABLES = 512


class Runnable(Protocol):
    """What the dispatcher needs of a program (one graph, one input signature)."""

    schedule: Schedule  # bound to the graph's regions
    layout: tuple[StateSlot, ...]
    timestep: int | None  # positions among the call's arguments
    latent: int | None
    condition: tuple[int, ...]
    warned: Warned
    compile_seconds: dict[str, float]
    replaying: AbstractContextManager[Any]  # held from a run until what it gave is kept

    @property
    def prologues(self) -> HasPrologues: ...
    @property
    def full_macs(self) -> int: ...  # of the row that computes everything
    def executable(self, row: Row) -> tuple[Variant, Callable[[Sequence[Any]], Sequence[Any]] | None]: ...
    def compile(self, variant: Variant, args: Sequence[Any]) -> Callable[[Sequence[Any]], Sequence[Any]]: ...
    def zeros(self, slot: int) -> torch.Tensor: ...
    def state(self) -> StreamState: ...


@dataclass
class Track:
    """The running state of one program in one trajectory, by stream. `kind`: which of the trajectory's programs it is,
    by the order in which they came."""

    kind: int
    states: dict[Hashable, StreamState] = field(default_factory=dict)
    hoisted: dict[Hashable, Hoisted] = field(default_factory=dict)
    finite: dict[Hashable, Finite] = field(default_factory=dict)
    tables: dict[Coefficients | float, torch.Tensor] = field(default_factory=dict)

    def table(self, values: Coefficients | float, device: str) -> torch.Tensor:
        """What depends on the step alone, as float32 on the device: uploaded once, without waiting for a GPU."""
        if values not in self.tables:
            if len(self.tables) == MAX_TABLES:
                self.tables.clear()
            self.tables[values] = upload(torch.tensor(values, dtype=torch.float32), torch.device(device))
        return self.tables[values]

    def forget(self) -> None:
        """Drop all state: the next call of each stream is cold."""
        self.states.clear()
        self.hoisted.clear()
        self.finite.clear()


@dataclass
class Past:
    """What is known of earlier trajectories of a handle: `walked` are the timesteps of the last whole one."""

    walked: Sequence[float] = ()


class Tracks:
    """One trajectory of a handle (None: all its calls outside any): the clock, and a track for each program that runs.

    Programs differ in their input signature. A trajectory may change it on its way: its clock goes on, and what another
    program kept serves that one alone, and only at the step after.
    """

    def __init__(
        self, trajectory: Trajectory | None = None, latent_jump: float = math.inf, past: Past | None = None
    ) -> None:
        self.exact = trajectory is not None
        named = trajectory is not None and trajectory.stream is not None
        self._clock = Counter if named else partial(Clock, math.inf if self.exact else latent_jump)
        self.told = None if trajectory is None else trajectory.told()
        self.past = past or Past()
        self.by_program: weakref.WeakKeyDictionary[Runnable, Track] = weakref.WeakKeyDictionary()
        self.lock = threading.Lock()
        self._kinds = itertools.count()
        self.reset()

    def of(self, program: Runnable) -> Track:
        track = self.by_program.get(program)
        if track is None:
            track = self.by_program[program] = Track(next(self._kinds))
        return track

    def programs(self) -> list[tuple[Runnable, Track]]:
        """Those that have run, each with its state."""
        return list(self.by_program.items())

    def forget(self) -> None:
        """Drop all state: the next call of each stream is cold. The clock goes on."""
        for _, track in self.programs():
            track.forget()

    def miss(self) -> None:
        """A call came that ran no program: the stream missed a step, so its next one is cold."""
        self.forget()
        self.clock.miss()

    def reset(self) -> None:
        """Forget everything: the next call is the first."""
        self.forget()
        self.clock: Clock | Counter = self._clock()
        self.probe = Probe()
        self.ahead = Ahead()
        self.records: list[StepRecord] = []

    def begin(self, placement: StepPlacement, observation: CallObservation, timesteps: Sequence[float]) -> None:
        """A trajectory starts; `timesteps`: those that it will have, if they are known."""
        self.forget()
        self.probe.start(observation.kind, observation.condition)
        self.ahead = Ahead(tuple(timesteps or self.past.walked))
        if not (self.exact or placement.broken_off):
            self.records.clear()

    def shown(self) -> list[StepRecord]:
        """The calls of the last trajectory. Where nobody says when one begins, calls whose timesteps move in one
        direction are of one, even if the clock lost it on the way."""
        records = list(self.records)
        if self.exact:
            return records
        first, direction, later = len(records), 0, None
        for i, now in reversed([(i, one.timestep) for i, one in enumerate(records)]):
            if now is not None and later is not None and now != later:
                moved = 1 if later > now else -1
                if moved == -direction:
                    break
                direction = moved
            first, later = i, later if now is None else now
        return records[first:]

    def walk(self, timestep: float) -> None:
        """Note where the trajectory is; a longer one than the last, or one that goes elsewhere, is what the next one
        will be."""
        self.ahead.walk(timestep)
        new = self.ahead.known and timestep not in self.ahead.known
        if new or len(self.ahead.walked) >= len(self.past.walked):
            self.past.walked = self.ahead.walked


class Finite(Flag):
    """The answer for the output of one step."""

    def __init__(self, output: torch.Tensor, step: int) -> None:
        self.step = step
        super().__init__(torch.isfinite(output).all())
