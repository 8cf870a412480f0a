"""Shards of a calibration: machines that know nothing of each other sample a part of the seeds each, into folders.

calibrate_shard(model, sample, part=0, parts=4, resume="shard0", seeds=16, granularity="output")    # on one machine
merge_shards("all", ["shard0", "shard1", "shard2", "shard3"])                                      # on any
calibrate(model, sample, budget="macs:0.34", resume="all", seeds=16, granularity="output")
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeca_compile.errors import OptionError, ScheduleError
from moeca_compile.frontend.prompts import check_seeds, sampler_of
from moeca_compile.planner.calibration import Studies, reported
from moeca_compile.planner.front import NOT_FOR_REQUESTS, bound_arguments
from moeca_compile.planner.origin import is_same
from moeca_compile.planner.request import Request
from moeca_compile.planner.rollout import Sampler
from moeca_compile.planner.store import FACTS, Store, is_close
from moeca_compile.planner.truth import goal_of
from moeca_compile.schedule.output import GIVEN

DRIFTS = ("drift", "split")


def calibrate_shard(
    model: Any, sample: Sampler | None = None, *, part: int, parts: int, resume: str | Path, **arguments: Any
) -> None:
    """Sample one part of a calibration's seeds, into a folder.

    The uncached samples, with granularity `output` also what its weights are fitted to, and with `truth="converged"`
    also the finer runs, which are most of the work. Each shard samples the first seed too, by which `merge_shards`
    compares them. An interrupted shard goes on when it is called again.

    Args:
        model: as for `moeca_compile.calibrate`; with the same weights on all machines.
        sample: likewise.
        part: which one, from 0.
        parts: how many there are: part p samples the seeds p, p + parts, ... of all, held-out ones included.
        resume: the folder of this shard.
        **arguments: those of `calibrate`, the same for all parts; a budget isn't needed.

    Raises:
        OptionError: a part that isn't there.
        ScheduleError, CaptureError: as `calibrate`.
    """
    if part not in range(parts):
        raise OptionError(f"calibrate_shard: part={part!r} of parts={parts!r}, expected a number from 0 to parts - 1")
    sample = sampler_of(model, sample, arguments.pop("prompts", None), arguments.pop("call", None), "calibrate_shard")
    budget = arguments.pop("budget", "macs:0.5")  # what is sampled here doesn't depend on it
    chosen = bound_arguments(model, sample, budget, arguments | {"resume": resume})
    request = Request.read(**{name: value for name, value in chosen.items() if name not in NOT_FOR_REQUESTS})
    granularity = "region" if chosen["granularity"] == "auto" else chosen["granularity"]
    goal = goal_of(chosen["truth"], model, sample, request, granularity)
    check_seeds(sample, len(request.seeds), "calibrate_shard")
    with reported(request, chosen["progress"]) as report_progress:
        study = Studies(model, sample, chosen["inner"], goal, report_progress).of(granularity, request)
        study.draw_shard((*request.seeds, *request.holdout)[part::parts])


def merge_shards(folder: str | Path, shards: Iterable[str | Path]) -> list[int]:
    """Merge what calibrations or shards kept into one folder, for `calibrate(..., resume=folder)`.

    Samples, drift and rollouts are taken over, so folders of calibrations for other budgets can be merged too. What the
    folder has already is compared, and stays. Stopped, the same call goes on.

    Args:
        folder: made if it isn't there.
        shards: folders that were `resume` of `calibrate_shard` or `calibrate`.

    Returns:
        The seeds whose uncached samples the folder has, of all granularities together.

    Raises:
        ScheduleError: a shard holds no calibration, is damaged, or is of another model, weights, sampler or inputs than
            the others.
    """
    stores: dict[str, Store] = {}
    for shard in map(Path, shards):
        parts = sorted(file.parent for file in shard.glob(f"*/{FACTS}"))
        if not parts:
            raise ScheduleError(f"merge: {str(shard)!r} holds no calibration; name folders that were given as resume")
        for part in parts:
            if part.name not in stores:
                stores[part.name] = Store(Path(folder) / part.name)
            _merge(Store(part), stores[part.name])
    return sorted({seed for store in stores.values() for seed in store.seeds()})


def _merge(source: Store, target: Store) -> None:
    """Everything of a store that another one lacks."""
    assert source.path is not None
    assert target.path is not None
    target.check(source.facts())
    for seed, origin in source.origins.items():
        if seed not in target.origins:
            target.add_origin(seed, origin)
        elif not is_same(target.origins[seed], origin):
            raise ScheduleError(
                f"merge: {str(source.path)!r} sampled seed {seed} from other inputs than the others did"
            )
    seconds = statistics.median(source.seconds) if source.seconds else 0.0
    for seed in source.seeds():
        samples, known = source.truth(seed), target.truth(seed)
        assert samples is not None
        if known is None:
            target.add_truth(seed, samples, seconds)
        elif not is_close(known, samples):
            raise ScheduleError(
                f"merge: {str(source.path)!r} holds other samples for seed {seed} than the others: it was made with "
                "other weights or another sampler"
            )
    for kind, seed in source.kept_arrays():
        arrays: Mapping[str, np.ndarray[Any, Any]] | None = source.arrays(kind, seed, dict)
        known_arrays: Mapping[str, np.ndarray[Any, Any]] | None = target.arrays(kind, seed, dict)
        assert arrays is not None
        if known_arrays is None:
            target.add_arrays(kind, seed, arrays)
        elif kind == GIVEN and not is_close(*(torch.from_numpy(of["samples"]) for of in (known_arrays, arrays))):
            raise ScheduleError(
                f"merge: {str(source.path)!r} was compared with other samples that truth gave for seed {seed} than the "
                "others were"
            )
    for name in DRIFTS:
        file = source.path / f"{name}.npz"
        if source.drift(name=name) is not None and target.drift(name=name) is None:
            part = target.path / f"{name}.part.npz"
            shutil.copyfile(file, part)
            part.replace(target.path / file.name)
    for (plan, seed), (errors, spent) in source.rollouts.items():
        if (plan, seed) not in target.rollouts:
            target.add_rollout(plan, seed, errors, spent, source.to_uncached[plan, seed])
    known_experts = target.perturbations()
    for result in source.perturbations():
        if result not in known_experts:
            target.add_perturbation(result)
