"""A denoising loop over a bundle: which graph runs at each step, and the state between steps."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from moeca_compile.errors import StateError
from moeca_compile.graph.variant import Slot, StateSlot
from moeca_compile.runtime.bundle import bfloat16
from moeca_compile.runtime.bundle.feeds import Arrays, admit, arrays_of
from moeca_compile.runtime.bundle.manifest import Manifest
from moeca_compile.runtime.output_rows import KEPT
from moeca_compile.runtime.prologues import HoistedValues
from moeca_compile.runtime.providers.provider import Loaded
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.stats import MAX_RECORDS, Stats, StepRecord
from moeca_compile.schedule import Row
from moeca_compile.schedule.output import OutputFacts

if TYPE_CHECKING:
    from moeca_compile.runtime.session import Session


class PlannedStep(NamedTuple):
    """A step of a trajectory before it runs.

    Attributes:
        step: its number, from 0.
        row: of the schedule.
        cold: state was missing, so that everything is computed.
        variant: that runs it.
        feeds: what the variant takes, without the hoisted values.
        batch: of the call.
        timestep: of the call; None: it wasn't read.
        ms: milliseconds that planning took.
    """

    step: int
    row: Row
    cold: bool
    variant: Loaded
    feeds: Arrays
    batch: int
    timestep: float | None
    ms: float

    @property
    def name(self) -> str:
        """Of the variant."""
        return str(self.variant.spec.name)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the variant, for one sample."""
        return int(self.variant.spec.macs)


class Loop(ABC):
    """What denoising loops over bundles and over compiled models have in common: one thread at a time, records, an end.

    Attributes:
        steps: how many calls are expected; None: any number.
        stream: a name for the records.
    """

    def __init__(self, steps: int | None, stream: str) -> None:
        if steps is not None and steps < 1:
            raise StateError(f"trajectory: steps={steps}, expected a whole number from 1 on")
        self.steps, self.stream = steps, stream
        self._records: deque[StepRecord] = deque(maxlen=MAX_RECORDS)
        self._lock = threading.Lock()
        self._step, self._closed = -1, False

    @property
    def records(self) -> list[StepRecord]:
        """One record for each step so far."""
        return list(self._records)

    def close(self) -> None:
        """Refuse further calls."""
        self._closed = True

    def __enter__(self) -> Self:
        self._refuse_closed()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run_alone(self, inputs: Any) -> Any:
        """Run the next step in this thread; no other thread may be in one."""
        if not self._lock.acquire(blocking=False):
            raise StateError("this trajectory is running in another thread: open one a thread and stream")
        try:
            return self._run(inputs)
        finally:
            self._lock.release()

    @abstractmethod
    def _run(self, inputs: Any) -> Any:
        """The next step."""

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StateError("this trajectory was closed: open another one")


class Trajectory(Loop):
    """One guidance stream of one denoising loop, with its cached state. A context manager; leaving it drops the state.

    Attributes:
        session: of the bundle, at the size of the first step's inputs.
        steps: how many calls are expected; None: any number.
        stream: a name for the records.
        state: of the stream; None: before the first step.
        hoisted: the stream's hoisted values.
    """

    def __init__(self, session: Session, steps: int | None, stream: str) -> None:
        super().__init__(steps, stream)
        self.session, self._all_sizes, self._batch = session, session, 0
        self.state: StreamState | None = None
        self.hoisted = HoistedValues(())

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the next step.

        Args:
            inputs: arrays by input name, as for `Session.run`. The batch is that of the first step.

        Returns:
            Arrays by output name.

        Raises:
            BundleError: inputs that the model doesn't take; the step doesn't count then.
            StateError: one step too many, another batch than before, a closed trajectory, or a second thread.
        """
        outputs: Arrays = self._run_alone(inputs)
        return outputs

    def reset(self) -> None:
        """Drop the state and the records: the next call is the first step."""
        with self._lock:
            self._step, self.state, self.hoisted = -1, None, HoistedValues(())
            self._records.clear()

    def close(self) -> None:
        """Drop the state and refuse further calls."""
        self.reset()
        super().close()

    def stats(self) -> Stats:
        """Report what ran so far, and the memory held.

        Returns:
            One record for each call, and the bytes of the cached state.
        """
        records = tuple(self._records)
        full_macs = sum(record.full_macs for record in records)
        macs = sum(record.macs for record in records)
        slots = zip(self.state.layout, self.state.tensors, strict=True) if self.state else ()
        state_bytes = sum(slot.bytes for slot, tensor in slots if tensor is not None)
        schedule = self.session.schedule
        return Stats(
            records, state_bytes, macs / full_macs if full_macs else 1.0, 1, {},
            timesteps=schedule.timesteps, searched_timesteps=schedule.searched_timesteps,
            output_weights=OutputFacts.of(schedule.output, schedule.rows),
        )  # fmt: skip

    def _run(self, inputs: Mapping[str, Any]) -> Arrays:
        planned = self.plan(inputs)
        variant, feeds = planned.variant, planned.feeds
        start = time.perf_counter()
        values = variant.run(feeds | self.hoisted.of(variant.spec.hoists, feeds))
        return self.commit(planned, values, (time.perf_counter() - start) * 1e3)

    def plan(self, inputs: Mapping[str, Any]) -> PlannedStep:
        """Find what the next step runs. Nothing is kept until `commit`: a step that fails may be planned again.

        Args:
            inputs: as for `run`.

        Raises:
            BundleError, StateError: as `run`.
        """
        begin = time.perf_counter()
        session, step = self.session, self._step + 1
        self._refuse_closed()
        session.driver.refuse_surplus(step, self.steps, self.stream)
        arrays = arrays_of(session.manifest, inputs)
        if self.state is None:
            session = self.session = self._all_sizes.for_sizes_of(arrays)
        feeds, batch = admit(session.manifest, arrays)
        if self.state is None:
            self.state = self._new_state(batch)
            self._batch, self.hoisted = batch, HoistedValues(session.prologues)
        elif batch != self._batch:
            raise StateError(f"the trajectory began with batch {self._batch}, this call has {batch}: open another one")
        timestep = timestep_of(session.manifest, feeds) if session.schedule.timesteps else None
        row, cold = session.driver.choose(self.state, step, timestep)
        variant = session.variant_of(row)
        feeds |= session.beside(variant, self.state, step, batch)
        if session.output_rows is not None:
            feeds[KEPT] = session.output_rows.kept(self.state, step, batch, feeds)
        return PlannedStep(step, row, cold, variant, feeds, batch, timestep, (time.perf_counter() - begin) * 1e3)

    def commit(self, planned: PlannedStep, values: list[Any], ms: float) -> Arrays:
        """Keep what the variant of a planned step wrote.

        Args:
            planned: what `plan` gave last.
            values: of the variant.
            ms: milliseconds that it took.

        Returns:
            The model's outputs by name.
        """
        begin = time.perf_counter()
        session, state, step, variant = self.session, self.state, planned.step, planned.variant
        assert state is not None
        outputs, writes = session.outputs_by_name(values), [slot_number(name) for name in variant.spec.writes]
        finite = not writes or all(_finite(array) for array in outputs.values())
        written = values[len(outputs) : len(outputs) + len(writes)]
        for place, number in enumerate(writes):
            if state.layout[number].slot is Slot.FIGURE:  # the step rule reads it on the host; no graph does
                written[place] = session.runtime.numpy(written[place])
        session.driver.keep(state, step, planned.row, writes, written, finite)
        if dropped := session.dropped_branches(variant, values):
            session.warned.once(left_out(f"step {step}", dropped))
        self._step = step
        spec, full_macs = variant.spec, session.variant_of(session.driver.full).spec.macs
        overhead = planned.ms + (time.perf_counter() - begin) * 1e3
        self._records.append(
            StepRecord(
                step, self.stream, spec.name, ms, overhead, spec.macs, planned.cold, dropped, full_macs,
                planned.timestep,
            )
        )  # fmt: skip
        return outputs

    def _new_state(self, batch: int) -> StreamState:
        return StreamState(state_layout(self.session.manifest, batch), self.session.manifest.regions)


def timestep_of(manifest: Manifest, feeds: Arrays) -> float | None:
    """The call's timestep; of several tokens' the middle one. None: the model takes none, it isn't finite, or it
    differs within the batch.

    Rows are counted then, with a warning, as in the torch engine: the row at a step doesn't depend on the samples, and
    a sampler that gives each of them a timestep of its own can be run. Weights that were fitted for a timestep don't
    serve.
    """
    times = np.asarray(feeds.get(manifest.timestep or "", ()), np.float64)
    if not times.size or not np.isfinite(times).all() or (times.ndim and (times != times[:1]).any()):
        return None
    return float(np.sort(times, axis=None)[times.size // 2])


def state_layout(manifest: Manifest, batch: int) -> tuple[StateSlot, ...]:
    """The state's slots, for this batch."""
    layout = []
    for spec in manifest.state:
        shape = spec.sizes(batch)
        size = math.prod(shape) * bfloat16.stored_dtype(spec.dtype).itemsize
        layout.append(StateSlot(spec.name, spec.region, spec.output, Slot(spec.slot), shape, spec.dtype, "", size))
    return tuple(layout)


def slot_number(name: str) -> int:
    return int(name.removeprefix("state_"))


def left_out(what: str, dropped: int) -> str:
    return (
        f"{what} left out {dropped} branches: these (token, expert) pairs exceeded their expert's capacity, so the "
        "result is approximate. Export with a larger capacity, or experts='dense'"
    )


def _finite(array: Any) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
