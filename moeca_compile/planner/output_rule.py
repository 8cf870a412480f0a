"""The last part of a calibration with granularity `output`: the plan's weights fitted, and what they give measured."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.output_fit import converged_path, fit_rule, record_path
from moeca_compile.planner.rollout import Sampler
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.study import Study
from moeca_compile.schedule import Action, Schedule
from moeca_compile.schedule.granularity import OUTPUT
from moeca_compile.schedule.output import TRUTHS

CONVERGED = "converged"


def check_truth(truth: str, granularity: str, sample: Sampler) -> None:
    """Refuse a truth that can't be had, before anything is sampled.

    Raises:
        ScheduleError: an unknown truth, another granularity, or a sampler that doesn't take `steps`.
    """
    if truth not in TRUTHS:
        raise ScheduleError(f"calibrate: truth={truth!r}, expected one of {', '.join(TRUTHS)}")
    if truth == CONVERGED and granularity != OUTPUT:
        raise ScheduleError(
            "calibrate: truth='converged' is reached by weights of the model's output. Give granularity='output' too"
        )
    if truth == CONVERGED and "steps" not in inspect.signature(sample).parameters:
        raise ScheduleError(
            "calibrate: truth='converged' samples with more steps, but sample(model, seed) takes none: give it a "
            "keyword steps, sample(model, seed, steps=50)"
        )


def with_output_rule(study: Study, schedule: Schedule, truth: str) -> Schedule:
    """Fit the weights of what the model returns at each step.

    Args:
        study: that found the schedule.
        schedule: of granularity `output`.
        truth: `uncached` or `converged`.

    Returns:
        The schedule with its weights, and in `predicted` `psnr_db` and `psnr_db_holdout` with them (of `uncached`), the
        same without them as `tried without weights`, and for `converged` how far the samples are from that
        (`psnr_db_converged_holdout`) and how far the uncached ones are (`uncached_psnr_db_converged_holdout`).

    Raises:
        ScheduleError: the sampler can't be fitted (`planner/output_fit.py`).
    """
    if all(row[0] is Action.COMPUTE for row in schedule.rows) and truth != CONVERGED:
        return schedule
    seeds, holdout, sampled = study.request.seeds, study.request.holdout, study.sampled
    begin = sampled.seconds
    study.report_progress("weights of the output", 0.97)
    uncached = [record_path(sampled, seed) for seed in seeds]
    targets: list[Sequence[Tensor]] = [path.states for path in uncached]
    if truth == CONVERGED:
        study.report_progress("samples with more steps", 0.97)
        targets = [converged_path(sampled, seed, study.sample, uncached[0]) for seed in seeds]
    fitted, paths = fit_rule(sampled, schedule, uncached, targets, seeds, truth)
    predicted = {**schedule.predicted, "tried without weights": schedule.predicted["psnr_db"]}
    pairs = zip(seeds, paths, strict=True)
    predicted["psnr_db"] = mean_psnr((study.errors(seed, path.states[-1]) for seed, path in pairs), study.data_range)
    if holdout:
        samples = {seed: sampled.run(seed, fitted) for seed in holdout}
        predicted["psnr_db_holdout"] = mean_psnr(
            (study.errors(seed, samples[seed]) for seed in holdout), study.data_range
        )
        if truth == CONVERGED:
            wanted = {seed: converged_path(sampled, seed, study.sample, uncached[0])[-1] for seed in holdout}
            for name, given in (("", samples), ("uncached_", study.truth)):
                errors = [(given[seed] - wanted[seed]).square().flatten(1).mean(1).tolist() for seed in holdout]
                predicted[f"{name}psnr_db_converged_holdout"] = mean_psnr(errors, study.data_range)
    study.seconds["weights"] = sampled.seconds - begin
    predicted["trajectories"] = study.trajectories
    return replace(
        fitted, predicted=predicted, made_by=f"{schedule.made_by}, weights of the output fitted to {truth} samples"
    )
