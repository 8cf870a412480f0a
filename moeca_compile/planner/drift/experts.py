"""Expert drift: how much the contribution of each expert changes from step to step.

Expert e of a layer contributes to token t the sum of g_tk y_tk over the slots k that are routed to e, with the gate
weights g; the contribution is zero if t is not routed to e. The *drift* of e is the distance of this contribution from
the one of the previous step (`reuse`) or from its linear extrapolation (`forecast`), on an uncached trajectory
(teacher-forced). A token that changes its expert counts for both experts. `planner/drift/stale.py` measures the effect
on the sample.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moeca_compile.engine.program import Program
from moeca_compile.graph.regions import Region
from moeca_compile.planner.drift.routed import Reading, RoutedLayer, values_of
from moeca_compile.planner.rollout import Call

EVERY, RUN = 6, 3  # of every 6 steps the first 3 are measured


@dataclass(frozen=True)
class ExpertDrift:
    """The drift of one expert.

    Attributes:
        region: the key of the experts region.
        layer: of the region.
        expert: its number.
        load: the fraction of the layer's expert branches that are routed to it.
        reuse: root mean square, over tokens, channels and steps, of the change since the previous step.
        forecast: the same of the error of a linear extrapolation.
    """

    region: str
    layer: int
    expert: int
    load: float
    reuse: float
    forecast: float


class ExpertWatch:
    """Measures the drift of all experts on the first trajectory that it observes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layers = [RoutedLayer(program, region, info) for region in program.regions for info in region.experts]
        self._history: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}  # by node and stream, latest first
        self._sums: dict[tuple[str, int], list[float]] = {}  # by node and expert: branches, reuse, forecast, steps
        self._regions: dict[str, tuple[Region, int]] = {}  # by node: its region and its number of experts
        self._steps: dict[str, int] = {}  # by stream
        self._finished = not self.layers

    def observe(self, call: Call) -> None:
        """Process one call."""
        step = call.record.step
        if self._finished or call.program is not self.program:
            return
        if step < self._steps.get(call.stream, 0):
            self._finished = True  # another trajectory
            return
        self._steps[call.stream] = step
        if step % EVERY >= RUN:
            return
        values = values_of(self.program, call.args, {node for layer in self.layers for node in layer.needs})
        for layer in self.layers:
            reading = layer.read(values)
            if reading is not None:
                self._accumulate(layer, call.stream, step, reading)

    def _accumulate(self, layer: RoutedLayer, stream: str, step: int, reading: Reading) -> None:
        name = layer.info.node
        parts = torch.stack([reading.part(expert) for expert in range(reading.experts)])  # [experts, T, D]
        counts = reading.ids.flatten().bincount(minlength=reading.experts)
        history = self._history.setdefault((name, stream), [])
        self._regions[name] = (layer.region, len(parts))
        for expert, count in enumerate(counts.tolist()):
            self._sum(name, expert)[0] += count
        if [computed for computed, _ in history] == [step - 1, step - 2]:
            (_, previous), (_, second) = history
            reuse = (parts - previous).square().mean(dim=(1, 2)).tolist()
            forecast = (parts - 2 * previous + second).square().mean(dim=(1, 2)).tolist()
            for expert in range(len(parts)):
                sums = self._sum(name, expert)
                sums[1] += reuse[expert]
                sums[2] += forecast[expert]
                sums[3] += 1
        self._history[name, stream] = [(step, parts), *history][:2]

    def _sum(self, node: str, expert: int) -> list[float]:
        return self._sums.setdefault((node, expert), [0.0] * 4)

    def drifts(self) -> tuple[ExpertDrift, ...]:
        """The drift of every expert, in graph order."""
        drifts = []
        for node, (region, experts) in self._regions.items():
            total = sum(self._sums[node, expert][0] for expert in range(experts))
            for expert in range(experts):
                load, reuse, forecast, count = self._sums[node, expert]
                drifts.append(
                    ExpertDrift(
                        region.key,
                        region.layer,
                        expert,
                        load / max(total, 1),
                        math.sqrt(reuse / max(count, 1)),
                        math.sqrt(forecast / max(count, 1)),
                    )
                )
        return tuple(drifts)

    def as_json(self) -> list[dict[str, Any]]:
        """The drifts as plain numbers."""
        return [asdict(drift) for drift in self.drifts()]
