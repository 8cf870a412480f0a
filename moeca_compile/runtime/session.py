"""Sampling from a bundle with numpy and a runtime: no torch, no model code.

session = Session.open("digits.moeca")
with session.trajectory(steps=50) as t:
    for ...:
        out = t.run({"x": x, "t": time, "y": labels})["output"]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle import bfloat16
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.feeds import Arrays, admit, arrays_of
from moeca_compile.runtime.bundle.manifest import COEFFICIENTS, NOW
from moeca_compile.runtime.bundle.signature import coefficients_of
from moeca_compile.runtime.driver import StepDriver
from moeca_compile.runtime.output_rows import OutputRows
from moeca_compile.runtime.prologues import HoistedValues, Prologue
from moeca_compile.runtime.providers.onnxruntime import CPU
from moeca_compile.runtime.providers.provider import Loaded, Runtime, runtime_of
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.trajectory import Trajectory, left_out, slot_number
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
            session.warned.once(left_out("this call", dropped))
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
            number = slot_number(name)
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
