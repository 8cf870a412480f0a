"""How much the sample suffers when one expert is stale: perturbed on purpose, one trajectory for each expert.

At every second step the expert's part of its layer's output (`Reading.part`) is the one of the step before, as an
interval of 2 with copies would have it for this expert alone; everything else is computed. What that does to the final
sample is the expert's harm. Beside the expert's drift it knows what later steps make of the error.

The model is run as it is compiled, and once more by an interpreter where the part is changed: about two uncached
trajectories for each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeca_compile.graph.autocast import autocast_is
from moeca_compile.graph.regions import ExpertsInfo, Region
from moeca_compile.planner.drift.routed import RoutedLayer, in_graph_order
from moeca_compile.planner.rollout import Call, SampledModel

PRICE = 2  # uncached trajectories for each expert, about


@dataclass(frozen=True)
class PerturbationResult:
    """PSNR in dB of a seed's samples, this expert stale, against the uncached ones: the lower, the more it matters."""

    region: str
    layer: int
    expert: int
    seed: int
    psnr_db: float


def stale_samples(sampled: SampledModel, seed: int, region: Region, info: ExpertsInfo, expert: int) -> Tensor:
    """The final samples of a seed with one expert of a layer stale."""
    return sampled.run(seed, watch=_Stale(sampled, region, info, expert))


class _Stale:
    """Watches a run and puts other results in the place of its own at every second step."""

    def __init__(self, sampled: SampledModel, region: Region, info: ExpertsInfo, expert: int) -> None:
        self.program, self.layer, self.expert = sampled.program, RoutedLayer(sampled.program, region, info), expert
        self.kept: dict[str, tuple[int, Tensor]] = {}

    def __call__(self, call: Call) -> tuple[Any, ...] | None:
        if call.program is not self.program:
            return None
        step, then = call.record.step, self.kept.get(call.stream)
        stale = None if then is None or step % 2 == 0 or then[0] != step - 1 else then[1]
        interpreter = _Interpreter(self, stale)
        results = interpreter.results(call.args)
        if interpreter.part is not None:
            self.kept[call.stream] = step, interpreter.part
        return results


class _Enough(Exception):
    """The part is known; the rest of the graph needn't run."""


class _Interpreter(torch.fx.Interpreter):
    """One call. With `stale` the expert's part is replaced by it; else the part is only looked up."""

    def __init__(self, of: _Stale, stale: Tensor | None) -> None:
        super().__init__(of.program.analysis.gm, garbage_collect_values=False)
        self.of, self.stale = of, stale
        self.part: Tensor | None = None

    def results(self, args: Sequence[Any]) -> tuple[Any, ...] | None:
        try:
            with autocast_is(()), torch.no_grad():
                return tuple(self.run(*in_graph_order(self.of.program, args)))
        except _Enough:
            return None

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n is not self.of.layer.output:
            return value
        reading = self.of.layer.read(self.env)
        if reading is None:
            raise _Enough
        self.part = reading.part(self.of.expert)
        if self.stale is None:
            raise _Enough
        return value + (self.stale - self.part).reshape(value.shape).to(value.dtype)
