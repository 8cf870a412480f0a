"""How unevenly a model changes from step to step: regions, tokens, branches and experts along uncached trajectories.

What is measured of a step against earlier ones is in `changes.py`; here calls become steps of trajectories. Only sums
are kept, and values of the last `2 gap` steps.
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
from moeca_compile.planner.drift.changes import Found, forecasts, load, routing, whole
from moeca_compile.planner.drift.ratios import Ratios
from moeca_compile.planner.drift.routed import Reading, RoutedLayer, values_of
from moeca_compile.planner.rollout import Call, SampledModel, Sampler

VECTORS = ("reuse at positions", "load", "load at positions", "transitions by expert", "branches by expert")
SQUARED = ("reuse", "forecast", "branches", "sum forecast", "branch forecast")


@dataclass(frozen=True)
class _Seen:
    """What a step leaves for later ones: outputs [tokens, channels] by line, and the branches of each MoE layer."""

    outputs: dict[str, Tensor]
    branches: dict[str, Reading]


class BranchWatch:
    """Looks at every call of whole trajectories, one after another.

    Attributes:
        ratios: what was found, see `planner/drift/changes.py`.
        regions: by key.
        refused: regions whose branches aren't one sum a token, and so were looked at as a whole only.
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
        self._last: dict[str, dict[int, _Seen]] = {}

    def begin(self) -> None:
        """A trajectory starts."""
        self._last.clear()

    def see(self, call: Call) -> None:
        """Take one call in."""
        if call.program is not self.program:
            return
        step, seen = call.record.step, self._read(call)
        last = self._last.setdefault(call.stream, {})
        then, before = last.get(step - self.gap), last.get(step - 2 * self.gap)
        for line, output in seen.outputs.items():
            one, two = (past.outputs[line] if past is not None else None for past in (then, before))
            self._add(line, step, whole(output, one, two, self._tokens(line, len(output))))
        for line, now in seen.branches.items():
            self._add(line, step, load(now, self._tokens(line, len(now.ids))))
            if then is not None:
                self._add(line, step, routing(now, then.branches[line]))
                if before is not None:
                    self._add(line, step, forecasts(now, then.branches[line], before.branches[line]))
        last[step] = seen
        last.pop(step - 2 * self.gap, None)

    def _read(self, call: Call) -> _Seen:
        values = values_of(self.program, call.args, self._needs)
        outputs = {key: values[node].float() for key, node in self._outputs.items()}
        outputs = {key: one.reshape(-1, one.shape[-1]) for key, one in outputs.items()}
        branches: dict[str, Reading] = {}
        for layer in self._routed:
            reading = layer.read(values)
            if reading is None or layer.region.key in branches:
                self.refused.add(layer.region.key)
            else:
                branches[layer.region.key] = reading
        return _Seen(outputs, {key: one for key, one in branches.items() if key not in self.refused})

    def _tokens(self, line: str, count: int) -> int:
        """Of a sample: of `count` tokens, positions repeat after so many."""
        shape = self.regions[line].shapes[0]
        return shape[-2] if len(shape) > 2 and count % shape[-2] == 0 else count

    def _add(self, line: str, step: int, found: Found) -> None:
        for what, (over, under) in found.items():
            self.ratios.add(what, line, step, over, under)

    def found(self, steps: int) -> dict[str, Any]:
        """By region, of what its kind has: `overall`, `by_step`, `by_expert` and `by_position`; plain numbers."""
        return {
            key: {"kind": region.kind, "layer": region.layer, **self._numbers(key, steps)}
            for key, region in self.regions.items()
        }

    def _numbers(self, key: str, steps: int) -> dict[str, Any]:
        ratios, mine = self.ratios, self.ratios.of(key)
        single = [what for what in mine if what not in VECTORS]
        numbers: dict[str, Any] = {
            "overall": {what: _plain(what, ratios.over_all(what, key))[0] for what in single},
            "by_step": {what: _plain(what, ratios.by_step(what, key, steps)[:, 0]) for what in single},
            "by_position": {"reuse": _plain("reuse", ratios.over_all("reuse at positions", key))}
            if "reuse at positions" in mine
            else {},
        }
        if "load" not in mine:
            return numbers
        experts = self._experts[key]
        places = ratios.over_all("load at positions", key).reshape(-1, experts)
        load = ratios.by_step("load", key, steps)
        numbers["overall"]["expert by step"] = information(load)
        numbers["overall"]["expert by position"] = information(places)
        numbers["by_position"]["load"] = places.T.tolist()
        numbers["by_expert"] = {"load": ratios.over_all("load", key).tolist(), "load by step": load.T.tolist()}
        for what in ("transitions", "branches"):
            if f"{what} by expert" in mine:
                each = ratios.by_step(f"{what} by expert", key, steps)
                numbers["by_expert"][what] = _plain(what, ratios.over_all(f"{what} by expert", key))
                numbers["by_expert"][f"{what} by step"] = [_plain(what, line) for line in each.T]
        return numbers


def information(shares: np.ndarray) -> float:
    """Mutual information, in bits, of the two axes of a table of shares; 0: the choice of expert ignores the other."""
    table = np.nan_to_num(shares) / np.nansum(shares)
    apart = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True)
    some = table > 0
    return float((table[some] * np.log2(table[some] / apart[some])).sum())


def _plain(what: str, values: np.ndarray) -> list[float]:
    """Roots of squares; all else as it is."""
    return [float(value) for value in (np.sqrt(values) if what in SQUARED else values)]


def branch_drift(
    model: torch.nn.Module,
    sample: Sampler,
    seeds: Sequence[int] = (0,),
    gap: int = 1,
    inner: str = "eager",
    tick: ProgressCallback = lambda text, share: None,
) -> dict[str, Any]:
    """Sample a model uncached and say how it changes from step to step.

    Args:
        model, sample, inner: as for `calibrate`.
        seeds: of the trajectories.
        gap: how many steps back a value is compared with.
        tick: is told what is being done, and which share of it is.

    Returns:
        `steps`, `gap`, `seeds` and, by key, `regions`; see `BranchWatch.found`.

    Raises:
        ScheduleError: no seed, a gap below 1, or a trajectory that is too short for it.
        CaptureError: as for `calibrate`.
    """
    if not seeds or gap < 1:
        raise ScheduleError(f"drift: seeds={tuple(seeds)}, gap={gap}: at least one seed and a gap of 1 or more")
    sampled = SampledModel(model, sample, "region", inner)
    watches: dict[Program, BranchWatch] = {}

    def see(call: Call) -> None:
        watches.setdefault(call.program, BranchWatch(call.program, gap)).see(call)

    for number, seed in enumerate(seeds):
        tick(f"seed {seed}", number / len(seeds))
        for watch in watches.values():
            watch.begin()
        sampled.run(seed, watch=see)
    if sampled.steps <= 2 * gap:
        raise ScheduleError(
            f"drift: the trajectory has {sampled.steps} steps; forecasts over a gap of {gap} need {2 * gap + 1}"
        )
    found = watches[sampled.program].found(sampled.steps)
    return {"steps": sampled.steps, "gap": gap, "seeds": len(seeds), "regions": found}
