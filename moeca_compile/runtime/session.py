"""Sampling from a bundle with numpy and a runtime: no torch, no model code.

session = Session.open("digits.moeca")
with session.trajectory(steps=50) as t:
    for ...:
        out = t.run({"x": x, "t": time, "y": labels})["output"]
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError, StateError
from moeca_compile.graph.variant import Slot, StateSlot
from moeca_compile.runtime.bundle import bfloat16
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.feeds import Arrays, admit, arrays_of
from moeca_compile.runtime.bundle.manifest import COEFFICIENTS, NOW, Manifest
from moeca_compile.runtime.bundle.signature import coefficients_of
from moeca_compile.runtime.driver import StepDriver
from moeca_compile.runtime.output_rows import KEPT, OutputRows
from moeca_compile.runtime.prologues import HoistedValues, Prologue
from moeca_compile.runtime.providers.onnxruntime import CPU
from moeca_compile.runtime.providers.provider import Loaded, Runtime, runtime_of
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.stats import MAX_RECORDS, Stats, StepRecord
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Row


class Session:
    """A loaded bundle, with every variant on one provider. Any number of trajectories may use it, in any threads.

    Attributes:
        bundle: the verified directory.
        provider: name of the provider that was asked for.
        runtime: runs the graphs.
        variants: the loaded graphs.
        prologues: the loaded graphs of hoisted values, with their entries of the manifest.
        output_rows: how rows run where the model's output is cached; None: each row is a graph.
        inputs, outputs: names, shapes and dtypes of what a call takes and returns.
        driver: the step rule.
        sizes: a session for each further size (resolution) of the bundle; the shapes of a call select its session.
    """

    def __init__(
        self, bundle: Bundle, runtime: Runtime, variants: tuple[Loaded, ...], sizes: tuple[Session, ...] = (),
        warned: Warned | None = None, prologues: tuple[Prologue, ...] = (),
    ) -> None:  # fmt: skip
        self.bundle, self.runtime, self.variants, self.sizes = bundle, runtime, variants, sizes
        self.prologues, self.provider = prologues, runtime.provider
        self.manifest, self.schedule = bundle.manifest, bundle.schedule
        self.inputs, self.outputs = self.manifest.inputs, self.manifest.outputs
        self.warned = warned or Warned()
        self.driver = StepDriver(self.schedule, self.warned)
        self.output_rows: OutputRows | None = None
        if self.manifest.caches_output:
            self.output_rows = OutputRows(self.manifest, self.schedule, runtime, variants[0], self.warned)
        self._by_row = {row: self._variant(row) for row in self.schedule.distinct_rows()}

    @classmethod
    def open(
        cls, path: str | Path, provider: str = CPU, memory: str = "speed", threads: int | None = None,
        provider_options: Mapping[str, Any] | None = None,
    ) -> Session:  # fmt: skip
        """Verify and load a bundle.

        Args:
            path: the directory that `moeca_compile.export` made.
            provider: an execution provider of onnxruntime, "openvino", or "tensorrt" for the bundle's engines. No other
                one is ever taken in its place.
            memory: "speed", or "shared": all variants (and processes) use one mapped copy of the weights, at the
                price of slower matrix multiplies on the CPU.
            threads: threads of one operator; None: the runtime's choice.
            provider_options: options of the provider, such as {"device_id": 1}; properties of the device for OpenVINO,
                {"library": "tensorrt-rtx"} for engines.

        Returns:
            The session, with every variant loaded.

        Raises:
            BundleError: the bundle isn't what was exported, or can't run here.
            OptionError: an unknown memory mode, or options that the provider doesn't take.
        """
        runtime = runtime_of(provider, memory, threads, provider_options)
        bundle = Bundle.open(path)
        return cls._load(bundle, runtime)

    @classmethod
    def _load(cls, bundle: Bundle, runtime: Runtime, warned: Warned | None = None) -> Session:
        warned = warned or Warned()
        pairs = zip(bundle.graphs, bundle.manifest.variants, strict=True)
        variants = tuple(runtime.load(graph, spec, bundle.manifest, bundle.path) for graph, spec in pairs)
        sizes = tuple(cls._load(sized_bundle, runtime, warned) for sized_bundle in bundle.sizes)
        prologues = tuple(
            (spec, runtime.load(graph, spec, bundle.manifest, bundle.path))
            for graph, spec in zip(bundle.prologues, bundle.manifest.prologues, strict=True)
        )
        return cls(bundle, runtime, variants, sizes, warned, prologues)

    def for_sizes_of(self, inputs: Mapping[str, Any]) -> Session:
        """The session for the size (resolution) of these inputs.

        Raises:
            BundleError: the bundle wasn't exported for that size.
        """
        if not self.sizes:
            return self
        sessions = (self, *self.sizes)
        for session in sessions:
            specs = [spec for spec in session.inputs if spec.name in inputs]
            if all(spec.batch_of(np.shape(inputs[spec.name])) for spec in specs):
                return session
        exported = "; or ".join(", ".join(map(str, session.inputs)) for session in sessions)
        shapes = ", ".join(f"{name} {list(np.shape(array))}" for name, array in inputs.items())
        raise BundleError(f"the inputs have the shapes {shapes}; the bundle was exported for {exported}")

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Make one call outside any trajectory: everything is computed, nothing is kept.

        Args:
            inputs: arrays by input name, with the shapes and dtypes of `inputs`; float32 stands for bfloat16.

        Returns:
            Arrays by output name.

        Raises:
            BundleError: inputs that the model doesn't take.
        """
        arrays = arrays_of(self.manifest, inputs)
        session = self.for_sizes_of(arrays)
        feeds, batch = admit(session.manifest, arrays)
        variant = session.variant_of(session.schedule.rows[0])
        hoisted = HoistedValues(session.prologues).of(variant.spec.hoists, feeds)
        values = variant.run(feeds | hoisted | session.beside(variant, None, 0, batch))
        if dropped := session.dropped_branches(variant, values):
            session.warned.once(_left_out("this call", dropped))
        return session.outputs_by_name(values)

    def trajectory(self, steps: int | None = None, stream: str = "") -> Trajectory:
        """Begin a denoising loop, or one guidance stream of it. Every call is exactly one step.

        Open one trajectory for each request. For guidance in two calls, open one for the conditional and one for the
        unconditional stream.

        Args:
            steps: how many calls are expected; one more is refused. None: any number.
            stream: a name for the records.

        Returns:
            A context manager that owns the cached state.

        Raises:
            StateError: `steps` isn't a positive number.
        """
        return Trajectory(self, steps, stream)

    def variant_of(self, row: Row) -> Loaded:
        """The variant that runs `row`."""
        return self._by_row[row]

    def _variant(self, row: Row) -> Loaded:
        if self.output_rows is not None:
            return self.output_rows.variant(row)
        number = self.manifest.steps[self.schedule.rows.index(row)]
        assert number is not None
        return self.variants[number]

    def beside(self, variant: Loaded, state: StreamState | None, step: int, batch: int) -> Arrays:
        """What a variant takes beside the model's inputs.

        Args:
            variant: that runs.
            state: of the stream; what was never written is zeros. None: the call is in no stream.
            step: number of the call, from 0.
            batch: of the call.

        Returns:
            Values by the names of the graph's inputs.
        """
        feeds: Arrays = {}
        for name in variant.spec.reads:
            number = _slot_number(name)
            tensor, spec = None if state is None else state.tensors[number], self.manifest.state[number]
            feeds[f"{name}_in"] = self.runtime.zeros(spec.sizes(batch), spec.dtype) if tensor is None else tensor
        if variant.spec.now:
            feeds[NOW] = np.array(step + 1, np.float32)
        if variant.spec.coefficients:
            assert state is not None  # without state the row is full, and a full row has no forecast
            feeds[COEFFICIENTS] = coefficients_of(self.manifest, self.driver.coefficients(state, step))
        return feeds

    def outputs_by_name(self, values: list[Any]) -> Arrays:
        """The model's outputs by name, from the values of a variant; bfloat16 as float32."""
        pairs = zip(self.outputs, values, strict=False)  # state follows the outputs
        arrays = (
            (spec, value if isinstance(value, np.ndarray) else self.runtime.numpy(value)) for spec, value in pairs
        )
        return {spec.name: bfloat16.from_stored(array, spec.dtype) for spec, array in arrays}

    def dropped_branches(self, variant: Loaded, values: list[Any]) -> int:
        """The number of expert branches that a variant left out: the last of its values, where it counts them."""
        return int(self.runtime.numpy(values[-1])) if variant.spec.counts_dropped else 0


class Trajectory:
    """One guidance stream of one denoising loop, with its cached state. A context manager; leaving it drops the
    state."""

    def __init__(self, session: Session, steps: int | None, stream: str) -> None:
        if steps is not None and steps < 1:
            raise StateError(f"trajectory: steps={steps}, expected a whole number from 1 on")
        self.session, self.stream, self._all_sizes = session, stream, session
        self.steps = steps
        self._records: deque[StepRecord] = deque(maxlen=MAX_RECORDS)
        self._lock = threading.Lock()
        self._step, self._batch = -1, 0
        self._state: StreamState | None = None
        self._hoisted = HoistedValues(())
        self._closed = False

    @property
    def records(self) -> list[StepRecord]:
        """One record for each step so far."""
        return list(self._records)

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
        if not self._lock.acquire(blocking=False):
            raise StateError("this trajectory is running in another thread: open one a thread and stream")
        try:
            return self._run(inputs)
        finally:
            self._lock.release()

    def reset(self) -> None:
        """Drop the state and the records: the next call is the first step."""
        with self._lock:
            self._step, self._state, self._hoisted = -1, None, HoistedValues(())
            self._records.clear()

    def close(self) -> None:
        """Drop the state and refuse further calls."""
        self.reset()
        self._closed = True

    def stats(self) -> Stats:
        """Report what ran so far, and the memory held.

        Returns:
            One record for each call, and the bytes of the cached state.
        """
        records = tuple(self._records)
        full_macs = sum(record.full_macs for record in records)
        macs = sum(record.macs for record in records)
        slots = zip(self._state.layout, self._state.tensors, strict=True) if self._state else ()
        state_bytes = sum(slot.bytes for slot, tensor in slots if tensor is not None)
        return Stats(records, state_bytes, macs / full_macs if full_macs else 1.0, 1, {})

    def __enter__(self) -> Trajectory:
        if self._closed:
            raise StateError("this trajectory was closed: open another one")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self, inputs: Mapping[str, Any]) -> Arrays:
        begin = time.perf_counter()
        session, step = self.session, self._step + 1
        if self._closed:
            raise StateError("this trajectory was closed: open another one")
        session.driver.refuse_surplus(step, self.steps, self.stream)
        arrays = arrays_of(session.manifest, inputs)
        if self._state is None:
            session = self.session = self._all_sizes.for_sizes_of(arrays)
        feeds, batch = admit(session.manifest, arrays)
        if self._state is None:
            self._batch = batch
            self._state = StreamState(_layout(session, batch), session.manifest.regions)
            self._hoisted = HoistedValues(session.prologues)
        elif batch != self._batch:
            raise StateError(f"the trajectory began with batch {self._batch}, this call has {batch}: open another one")
        state, driver = self._state, session.driver
        timestep = timestep_of(session.manifest, feeds) if session.schedule.timesteps else None
        row, cold = driver.choose(state, step, timestep)
        variant = session.variant_of(row)
        feeds |= session.beside(variant, state, step, batch)
        if session.output_rows is not None:
            feeds[KEPT] = session.output_rows.kept(state, step, batch, feeds)
        start = time.perf_counter()
        values = variant.run(feeds | self._hoisted.of(variant.spec.hoists, feeds))
        end = time.perf_counter()
        outputs, writes = session.outputs_by_name(values), [_slot_number(name) for name in variant.spec.writes]
        finite = not writes or all(_finite(array) for array in outputs.values())
        written = values[len(outputs) : len(outputs) + len(writes)]
        for place, number in enumerate(writes):
            if state.layout[number].slot is Slot.FIGURE:  # the step rule reads it on the host; no graph does
                written[place] = session.runtime.numpy(written[place])
        driver.keep(state, step, row, writes, written, finite)
        if dropped := session.dropped_branches(variant, values):
            session.warned.once(_left_out(f"step {step}", dropped))
        self._step = step
        full_macs = session.variant_of(driver.full).spec.macs
        ms = (end - start) * 1e3
        overhead = (time.perf_counter() - begin) * 1e3 - ms
        self._records.append(
            StepRecord(
                step,
                self.stream,
                variant.spec.name,
                ms,
                overhead,
                variant.spec.macs,
                cold,
                dropped,
                full_macs,
                timestep,
            )
        )
        return outputs


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


def _layout(session: Session, batch: int) -> tuple[StateSlot, ...]:
    """The state's slots, for this batch."""
    layout = []
    for spec in session.manifest.state:
        shape = spec.sizes(batch)
        size = math.prod(shape) * bfloat16.stored_dtype(spec.dtype).itemsize
        layout.append(StateSlot(spec.name, spec.region, spec.output, Slot(spec.slot), shape, spec.dtype, "", size))
    return tuple(layout)


def _slot_number(name: str) -> int:
    return int(name.removeprefix("state_"))


def _left_out(what: str, dropped: int) -> str:
    return (
        f"{what} left out {dropped} branches: these (token, expert) pairs exceeded their expert's capacity, so the "
        "result is approximate. Export with a larger capacity, or experts='dense'"
    )


def _finite(array: Any) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
