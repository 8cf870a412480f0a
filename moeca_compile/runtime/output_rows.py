"""The rows of a bundle that caches the model's output: its one network, and sums of its last outputs.

A cheap step runs no graph. What is kept are the network's outputs, as arrays on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moeca_compile.graph.variant import SLOTS
from moeca_compile.runtime.bundle.manifest import COEFFICIENTS, Manifest, VariantSpec
from moeca_compile.runtime.output_weights import OutputWeights
from moeca_compile.runtime.providers.provider import Loaded, Runtime
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.runtime.weighted import polynomial, weighted, wide
from moeca_compile.schedule import Act, Action, Row, Schedule
from moeca_compile.schedule.action import format_row
from moeca_compile.schedule.forecast import COPY

EPSILONS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # of latents; finer dtypes round less than the check sees
KEPT = "moeca_kept"  # among the feeds of a step in a trajectory: a `Kept`


class Kept(NamedTuple):
    """What a step of a trajectory has beside its inputs.

    Attributes:
        values: by number of the model's output, the last ones that were computed, latest first.
        weights: of the output rule; None: the polynomial serves.
        observe: is called with what a computed step returns, in at least float32.
    """

    values: tuple[tuple[Any, ...], ...]
    weights: Sequence[float] | None
    observe: Callable[[Any], None] | None = None


class OutputRows:
    """How the rows of one schedule run.

    Args:
        manifest: of a bundle with one network.
        schedule: the bundle's.
        runtime: of the network.
        network: the loaded network.
        warned: counts the warnings.
    """

    def __init__(
        self, manifest: Manifest, schedule: Schedule, runtime: Runtime, network: Loaded, warned: Warned
    ) -> None:
        self.manifest, self.runtime, self.network = manifest, runtime, network
        has_latent = manifest.latent is not None
        self.rule = None if schedule.output is None else OutputWeights(schedule, warned, has_latent)
        self.latent = next((spec for spec in manifest.inputs if spec.name == manifest.latent), None)

    def variant(self, row: Row) -> Loaded:
        """What runs a row."""
        return ComputedRow(self) if row[0] is Action.COMPUTE else ForecastRow(self, row[0])

    def kept(self, state: StreamState, step: int, batch: int, feeds: Mapping[str, Any]) -> Kept:
        """What a step finds in the stream.

        Args:
            state: of the stream, after the step rule chose the row.
            step: number of the call, from 0.
            batch: of the call.
            feeds: the call's inputs, as a runtime stores them.
        """
        weights = None
        if self.rule is not None:
            shape = self.manifest.outputs[0].sizes(batch)
            weights = self.rule.at(state, step, shape)
        values: list[list[Any]] = [[] for _ in self.manifest.outputs]
        for spec, value in zip(self.manifest.state, state.tensors, strict=True):
            if value is not None:
                values[spec.output].append(value)
        return Kept(tuple(map(tuple, values)), weights, self._checked(state, step, feeds))

    def _checked(self, state: StreamState, step: int, feeds: Mapping[str, Any]) -> Callable[[Any], None] | None:
        """The check of the sampler's first update."""
        check, latent = None if self.rule is None else self.rule.sampler, self.latent
        if check is None or latent is None:
            return None
        array, rounding = feeds[latent.name], EPSILONS.get(latent.dtype, 0.0)
        return check.observer(state, step, lambda: wide(array, latent.dtype), rounding)

    def weighted(self, feeds: Mapping[str, Any], weights: Sequence[float], outputs: Sequence[Any]) -> Any:
        """The output rule's sum for the model's first output."""
        assert self.rule is not None
        array, dtype = (None, "") if self.latent is None else (feeds[self.latent.name], self.latent.dtype)
        return weighted(self.rule.terms, weights, outputs, self.manifest.outputs[0].dtype, array, dtype)


class ComputedRow:
    """The row that runs the network. Its values: the network's outputs, the first one weighed; the outputs as they are,
    to be kept; what the network counts."""

    def __init__(self, rows: OutputRows) -> None:
        self._rows, self.network = rows, rows.network
        spec, state = rows.network.spec, rows.manifest.state
        writes = tuple(slot.name for slot in state if slot.slot == SLOTS[0])
        self.spec = VariantSpec(
            spec.name, spec.file, spec.row, spec.takes, (), writes, False, spec.counts_dropped, spec.macs
        )

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        return self.after(feeds, self._rows.network.run(feeds))

    def after(self, feeds: Mapping[str, Any], values: list[Any]) -> list[Any]:
        """The row's values, from those of the network."""
        rows, step, count = self._rows, feeds.get(KEPT), len(self._rows.manifest.outputs)
        arrays = [rows.runtime.numpy(value) for value in values[:count]]
        kept = [array.copy() for array in arrays] if self.spec.writes else []  # the caller may write to what it gets
        if kept and step is not None and step.weights is not None:
            arrays[0] = rows.weighted(feeds, step.weights, (kept[0], *step.values[0]))
        if step is not None and step.observe is not None:
            step.observe(wide(arrays[0], rows.manifest.outputs[0].dtype))
        return [*arrays, *kept, *values[count:]]


class ForecastRow:
    """A row that runs no graph."""

    network: Loaded | None = None

    def __init__(self, rows: OutputRows, act: Act) -> None:
        self._rows = rows
        row = format_row((act,), {})
        self.spec = VariantSpec("v1", "", row, (), (), (), act is Action.FORECAST, False, 0)

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        step: Kept = feeds[KEPT]
        weights = feeds[COEFFICIENTS][0].tolist() if self.spec.coefficients else COPY
        outputs = [
            polynomial(values, spec.dtype, weights)
            for values, spec in zip(step.values, self._rows.manifest.outputs, strict=True)
        ]
        if step.weights is not None:
            outputs[0] = self._rows.weighted(feeds, step.weights, step.values[0])
        return outputs
