"""The thresholds of `Control`, measured on the caller's own trajectories.

A schedule whose rows compute a part of the branches runs unchanged, while the inputs of its choices are recorded. At
each such step the drift of an expert is its mean score over a sample's branches. The threshold of an expert is a
quantile of these drifts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeca_compile.errors import ScheduleError
from moeca_compile.ops.branch_slots import drift_of
from moeca_compile.planner.rollout import Call, SampledModel, Sampler
from moeca_compile.schedule import Partial, Schedule

Drifts = dict[
    str, list[Tensor]
]  # by region key, for each step [samples, experts]; NaN: the expert has no cached branch


class _PickRecorder(TorchDispatchMode):
    """Records the arguments of `moeca::pick`, in the order of the graph."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.moeca.pick.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))

    def take(self) -> list[tuple[Any, ...]]:
        """The calls since the last `take`."""
        calls, self.calls = self.calls, []
        return calls


def expert_thresholds(
    model: torch.nn.Module, sample: Sampler, schedule: Schedule, *, share: float = 0.25, seeds: Sequence[int] = (0,)
) -> Schedule:
    """Measure for each expert the drift above which its branches are computed before those of other experts.

    The schedule is run as it is. At each step whose row computes a part of the branches, the drift of each expert is
    the mean, over a sample's branches that are routed to it and cached, of what the schedule's `Control.score` says. An
    expert's threshold is the `1 - share` quantile of its drifts.

    Args:
        model: as for `calibrate`.
        sample: as for `calibrate`.
        schedule: with rows that compute a part of the branches (tau > 0). Its own thresholds are measured anew.
        share: of the steps and samples in which an expert's drift reaches its threshold, between 0 and 1. An expert
            that held no branch anywhere gets 0: it comes first whenever it does.
        seeds: of the trajectories.

    Returns:
        `schedule` with `control.threshold` set for each expert.

    Raises:
        ScheduleError: a share outside (0, 1), no seed, no choice of branches to be measured, or a sampler that never
            calls the model.
        CaptureError: as for `calibrate`.
    """
    if not 0 < share < 1 or not seeds:
        raise ScheduleError(f"thresholds: share={share}, seeds={tuple(seeds)}: a share between 0 and 1, and a seed")
    plain = replace(schedule, control=replace(schedule.control, threshold={}))
    drifts = _drifts(model, sample, plain, seeds)
    if not drifts:
        raise ScheduleError("thresholds: no step of the schedule chose branches: give it rows with PARTIAL(0, tau)")
    table = {}
    for key, step_drifts in drifts.items():
        limits = torch.nanquantile(torch.cat(step_drifts), 1 - share, dim=0)
        table[key] = tuple(limits.nan_to_num(0.0).tolist())
    return replace(plain, control=replace(plain.control, threshold=table))


def _drifts(model: torch.nn.Module, sample: Sampler, schedule: Schedule, seeds: Sequence[int]) -> Drifts:
    sampled = SampledModel(model, sample, schedule.granularity or "region", "eager", schedule)
    drifts: Drifts = defaultdict(list)
    recorder = _PickRecorder()

    def observe(call: Call) -> None:
        program, calls = call.program, recorder.take()
        if program is not sampled.program:
            return
        compiled = call.compiled
        rows = {compiled.variants.variant(row).name: row for row in compiled.schedule.distinct_rows()}
        acts = zip(program.regions, rows[call.record.variant], strict=True)
        choosing = [region for region, act in acts if isinstance(act, Partial) and act.tau]
        last = calls[len(calls) - len(choosing) :]  # tracing a variant calls it too, and its first call runs it twice
        for region, (ids, _, held, due, *_) in zip(choosing, last, strict=True):
            drifts[region.key].append(drift_of(ids, held, due, region.routers[0].num_experts))

    for seed in seeds:
        sampled.run(seed, schedule, observe, recorder)
    return drifts
