"""The effect of one stale expert on the sample, by a perturbed trajectory for each expert.

At every second step the expert's contribution to the output of its layer (`Reading.part`) is replaced by the one of the
previous step, as with reuse and an interval of 2 for this expert alone; everything else is computed. The result is the
PSNR of the final sample. Unlike the drift of the expert it includes what later steps do with the error.

The compiled model runs first, and an interpreter repeats each call with the contribution replaced: about two uncached
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

PRICE = 2  # of one expert, in uncached trajectories


@dataclass(frozen=True)
class PerturbationResult:
    """The effect of one stale expert.

    Attributes:
        region: the key of the experts region.
        layer: of the region.
        expert: its number.
        seed: of the samples.
        psnr_db: of the samples against the uncached ones; a low value means that the expert matters.
    """

    region: str
    layer: int
    expert: int
    seed: int
    psnr_db: float


def stale_samples(sampled: SampledModel, seed: int, region: Region, info: ExpertsInfo, expert: int) -> Tensor:
    """The final samples of a seed with one expert of a layer stale."""
    return sampled.run(seed, watch=_StaleExpert(sampled, region, info, expert))


class _StaleExpert:
    """Replaces the results of a run at every second step by those with a stale expert."""

    def __init__(self, sampled: SampledModel, region: Region, info: ExpertsInfo, expert: int) -> None:
        self.program, self.layer, self.expert = sampled.program, RoutedLayer(sampled.program, region, info), expert
        self.last: dict[str, tuple[int, Tensor]] = {}  # by stream: the last step and the expert's contribution

    def __call__(self, call: Call) -> tuple[Any, ...] | None:
        if call.program is not self.program:
            return None
        step, last = call.record.step, self.last.get(call.stream)
        stale = last[1] if last is not None and step % 2 == 1 and last[0] == step - 1 else None
        interpreter = _Interpreter(self, stale)
        results = interpreter.results(call.args)
        if interpreter.part is not None:
            self.last[call.stream] = step, interpreter.part
        return results


class _StopInterpreter(Exception):
    """Ends a call once the contribution is known."""


class _Interpreter(torch.fx.Interpreter):
    """Runs one call with the expert's contribution replaced by `stale`; if `stale` is None it only reads it."""

    def __init__(self, perturbation: _StaleExpert, stale: Tensor | None) -> None:
        super().__init__(perturbation.program.analysis.gm, garbage_collect_values=False)
        self.perturbation, self.stale = perturbation, stale
        self.part: Tensor | None = None

    def results(self, args: Sequence[Any]) -> tuple[Any, ...] | None:
        try:
            with autocast_is(()), torch.no_grad():
                return tuple(self.run(*in_graph_order(self.perturbation.program, args)))
        except _StopInterpreter:
            return None

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n is not self.perturbation.layer.output:
            return value
        reading = self.perturbation.layer.read(self.env)
        if reading is None:
            raise _StopInterpreter
        self.part = reading.part(self.perturbation.expert)
        if self.stale is None:
            raise _StopInterpreter
        return value + (self.stale - self.part).reshape(value.shape).to(value.dtype)
