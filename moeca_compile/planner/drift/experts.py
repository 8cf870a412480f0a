"""How much each expert's part of the output changes from step to step: numbers for whoever keeps branches apart.

Expert e of a layer contributes to token t the sum of g_tk y_tk over the slots k that are routed to e, gate weights g
included; where t isn't routed to e that is zero. The *drift* of e is how far this contribution at a step is from what
the steps before give, copied (`reuse`) or extrapolated (`forecast`), on an uncached trajectory (teacher-forced): a
token that changes its experts counts for both. What the sample suffers is another question (`planner/drift/stale.py`).
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

EVERY, RUN = 6, 3  # of so many steps the first few are looked at


@dataclass(frozen=True)
class ExpertDrift:
    """Root mean squares over tokens, channels and steps; `load`: the share of the layer's branches that are its own."""

    region: str
    layer: int
    expert: int
    load: float
    reuse: float
    forecast: float


class ExpertWatch:
    """Looks at the calls of one trajectory, the first that it sees."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layers = [RoutedLayer(program, region, info) for region in program.regions for info in region.experts]
        self._last: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
        self._sums: dict[tuple[str, int], list[float]] = {}
        self._parts: dict[str, tuple[Region, int]] = {}
        self._streams: dict[str, int] = {}
        self._over = not self.layers

    def see(self, call: Call) -> None:
        """Take one call in."""
        step = call.record.step
        if self._over or call.program is not self.program:
            return
        if step < self._streams.get(call.stream, 0):
            self._over = True  # another trajectory
            return
        self._streams[call.stream] = step
        if step % EVERY >= RUN:
            return
        values = values_of(self.program, call.args, {node for layer in self.layers for node in layer.needs})
        for layer in self.layers:
            reading = layer.read(values)
            if reading is not None:
                self._take(layer, call.stream, step, reading)

    def _take(self, layer: RoutedLayer, stream: str, step: int, reading: Reading) -> None:
        name = layer.info.node
        parts = torch.stack([reading.part(expert) for expert in range(reading.experts)])  # [experts, T, D]
        counts = reading.ids.flatten().bincount(minlength=reading.experts)
        kept = self._last.setdefault((name, stream), [])
        self._parts[name] = (layer.region, len(parts))
        for expert, count in enumerate(counts.tolist()):
            self._sum(name, expert)[0] += count
        if len(kept) == 2 and [at for at, _ in kept] == [step - 1, step - 2]:
            (_, one), (_, two) = kept
            reuse = (parts - one).square().mean(dim=(1, 2)).tolist()
            forecast = (parts - 2 * one + two).square().mean(dim=(1, 2)).tolist()
            for expert in range(len(parts)):
                sums = self._sum(name, expert)
                sums[1] += reuse[expert]
                sums[2] += forecast[expert]
                sums[3] += 1
        self._last[name, stream] = [(step, parts), *kept][:2]

    def _sum(self, node: str, expert: int) -> list[float]:
        return self._sums.setdefault((node, expert), [0.0] * 4)

    def found(self) -> tuple[ExpertDrift, ...]:
        """One entry an expert, in graph order."""
        drifts = []
        for node, (region, experts) in self._parts.items():
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
        return [asdict(one) for one in self.found()]
