"""The changes of regions, tokens, expert branches and experts along uncached trajectories.

`changes.py` compares the values of two or three steps; this module applies it to the calls of a trajectory. It keeps
sums only, and the values of the last `2 gap` steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeca_compile.engine.program import Program
from moeca_compile.errors import ScheduleError
from moeca_compile.graph import fx
from moeca_compile.inspect.progress import ProgressCallback
from moeca_compile.planner.drift.changes import Fractions, forecasts, load, region_changes, routing
from moeca_compile.planner.drift.ratios import Ratios
from moeca_compile.planner.drift.routed import Reading, RoutedLayer, values_of
from moeca_compile.planner.rollout import Call, SampledModel, Sampler

VECTORS = ("reuse at positions", "load", "load at positions", "transitions by expert", "branches by expert")
SQUARED = ("reuse", "forecast", "branches", "sum forecast", "branch forecast")  # reported as square roots


@dataclass(frozen=True)
class _StepValues:
    """The values of one step, by region key: outputs [tokens, channels] float32, and the branches of MoE layers."""

    outputs: dict[str, Tensor]
    branches: dict[str, Reading]


class BranchWatch:
    """Measures the changes along one or more whole trajectories.

    Args:
        program: whose calls are observed.
        gap: how many steps back a value is compared with.

    Attributes:
        ratios: the measurements; `planner/drift/changes.py` defines the quantities.
        regions: by key.
        refused: keys of regions whose output is not one sum of branches per token: only their outputs are measured.
    """

    def __init__(self, program: Program, gap: int = 1) -> None:
        self.program, self.gap, self.ratios = program, gap, Ratios()
        self.regions = {region.key: region for region in program.regions}
        self.refused: set[str] = set()
        self._routed = [RoutedLayer(program, region, info) for region in program.regions for info in region.experts]
        gm = program.analysis.gm
        self._outputs = {region.key: fx.resolve(gm, region.outputs[:1])[0] for region in program.regions}
        self._experts = {layer.region.key: layer.experts for layer in self._routed}
        self._needs = {node for layer in self._routed for node in layer.needs} | set(self._outputs.values())
        self._last: dict[str, dict[int, _StepValues]] = {}  # by stream and step

    def begin(self) -> None:
        """Start a trajectory."""
        self._last.clear()

    def observe(self, call: Call) -> None:
        """Process one call."""
        if call.program is not self.program:
            return
        step, now = call.record.step, self._read(call)
        last = self._last.setdefault(call.stream, {})
        previous, earlier = last.get(step - self.gap), last.get(step - 2 * self.gap)
        for key, output in now.outputs.items():
            previous_output = previous.outputs[key] if previous is not None else None
            earlier_output = earlier.outputs[key] if earlier is not None else None
            tokens = self._tokens_per_sample(key, len(output))
            self._add(key, step, region_changes(output, previous_output, earlier_output, tokens))
        for key, reading in now.branches.items():
            self._add(key, step, load(reading, self._tokens_per_sample(key, len(reading.ids))))
            if previous is not None:
                self._add(key, step, routing(reading, previous.branches[key]))
                if earlier is not None:
                    self._add(key, step, forecasts(reading, previous.branches[key], earlier.branches[key]))
        last[step] = now
        last.pop(step - 2 * self.gap, None)

    def _read(self, call: Call) -> _StepValues:
        values = values_of(self.program, call.args, self._needs)
        outputs = {}
        for key, node in self._outputs.items():
            outputs[key] = values[node].float().reshape(-1, values[node].shape[-1])
        branches: dict[str, Reading] = {}
        for layer in self._routed:
            reading = layer.read(values)
            if reading is None or layer.region.key in branches:
                self.refused.add(layer.region.key)
            else:
                branches[layer.region.key] = reading
        return _StepValues(outputs, {key: reading for key, reading in branches.items() if key not in self.refused})

    def _tokens_per_sample(self, key: str, count: int) -> int:
        """The number of tokens of one sample, if all samples together have `count`."""
        shape = self.regions[key].shapes[0]
        return shape[-2] if len(shape) > 2 and count % shape[-2] == 0 else count

    def _add(self, key: str, step: int, fractions: Fractions) -> None:
        for quantity, (numerator, denominator) in fractions.items():
            self.ratios.add(quantity, key, step, numerator, denominator)

    def summary(self, steps: int) -> dict[str, Any]:
        """The measurements as plain numbers.

        Args:
            steps: of the trajectory.

        Returns:
            By region key: `kind`, `layer`, and by quantity `overall`, `by_step`, `by_expert` and `by_position`, as far
            as the region has them.
        """
        return {
            key: {"kind": region.kind, "layer": region.layer, **self._numbers(key, steps)}
            for key, region in self.regions.items()
        }

    def _numbers(self, key: str, steps: int) -> dict[str, Any]:
        ratios, quantities = self.ratios, self.ratios.of(key)
        scalars = [quantity for quantity in quantities if quantity not in VECTORS]
        numbers: dict[str, Any] = {
            "overall": {quantity: _as_floats(quantity, ratios.over_all(quantity, key))[0] for quantity in scalars},
            "by_step": {
                quantity: _as_floats(quantity, ratios.by_step(quantity, key, steps)[:, 0]) for quantity in scalars
            },
            "by_position": {},
        }
        if "reuse at positions" in quantities:
            numbers["by_position"]["reuse"] = _as_floats("reuse", ratios.over_all("reuse at positions", key))
        if "load" not in quantities:
            return numbers
        experts = self._experts[key]
        positions = ratios.over_all("load at positions", key).reshape(-1, experts)
        load = ratios.by_step("load", key, steps)
        numbers["overall"]["expert by step"] = information(load)
        numbers["overall"]["expert by position"] = information(positions)
        numbers["by_position"]["load"] = positions.T.tolist()
        numbers["by_expert"] = {"load": ratios.over_all("load", key).tolist(), "load by step": load.T.tolist()}
        for quantity in ("transitions", "branches"):
            vector = f"{quantity} by expert"
            if vector in quantities:
                by_step = ratios.by_step(vector, key, steps)  # [steps, experts]
                numbers["by_expert"][quantity] = _as_floats(quantity, ratios.over_all(vector, key))
                numbers["by_expert"][f"{quantity} by step"] = [_as_floats(quantity, column) for column in by_step.T]
        return numbers


def information(shares: np.ndarray) -> float:
    """Mutual information, in bits, of the two axes of a table of fractions; 0: the axes are independent.

    Source: Cover & Thomas, Elements of Information Theory, 2.3.
    """
    table = np.nan_to_num(shares) / np.nansum(shares)
    independent = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True)
    positive = table > 0
    return float((table[positive] * np.log2(table[positive] / independent[positive])).sum())


def _as_floats(quantity: str, values: np.ndarray) -> list[float]:
    """The values, or the square roots of squared quantities."""
    return [float(value) for value in (np.sqrt(values) if quantity in SQUARED else values)]


def branch_drift(
    model: torch.nn.Module,
    sample: Sampler,
    seeds: Sequence[int] = (0,),
    gap: int = 1,
    inner: str = "eager",
    report_progress: ProgressCallback = lambda text, share: None,
) -> dict[str, Any]:
    """Sample a model uncached and measure how it changes from step to step.

    Args:
        model, sample, inner: as for `calibrate`.
        seeds: of the trajectories.
        gap: how many steps back a value is compared with.
        report_progress: called with what is being done and the fraction done.

    Returns:
        `steps`, `gap`, `seeds` and, by key, `regions`; see `BranchWatch.summary`.

    Raises:
        ScheduleError: no seed, a gap below 1, or a trajectory that is too short for the gap.
        CaptureError: as for `calibrate`.
    """
    if not seeds or gap < 1:
        raise ScheduleError(f"drift: seeds={tuple(seeds)}, gap={gap}: at least one seed and a gap of 1 or more")
    sampled = SampledModel(model, sample, "region", inner)
    watches: dict[Program, BranchWatch] = {}

    def observe(call: Call) -> None:
        watches.setdefault(call.program, BranchWatch(call.program, gap)).observe(call)

    for number, seed in enumerate(seeds):
        report_progress(f"seed {seed}", number / len(seeds))
        for watch in watches.values():
            watch.begin()
        sampled.run(seed, watch=observe)
    if sampled.steps <= 2 * gap:
        raise ScheduleError(
            f"drift: the trajectory has {sampled.steps} steps; forecasts over a gap of {gap} need {2 * gap + 1}"
        )
    regions = watches[sampled.program].summary(sampled.steps)
    return {"steps": sampled.steps, "gap": gap, "seeds": len(seeds), "regions": regions}
