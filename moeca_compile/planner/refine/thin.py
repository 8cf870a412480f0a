"""Schedules that compute some expert branches, and thinning: fewer of them, where that does not lower the quality.

A schedule with cached branches computes some of them in every layer of every cheap step (a step that is not full).
Thinning caches a third of the layers as whole regions, or computes branches in some of the cheap steps only. There is
no estimate of the effect, so each way of thinning is rolled out, and used if the samples are better.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from moeca_compile.errors import ScheduleError
from moeca_compile.graph.regions import Divisible, Indivisible, RegionMap
from moeca_compile.planner.refine.better import BETTER_DB, BetterSchedule, with_costs
from moeca_compile.planner.search.predict import predictors_of
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import Plan, schedule_of
from moeca_compile.planner.search.search import RACE_SEEDS
from moeca_compile.planner.study import Study
from moeca_compile.schedule import Action, Partial, Row, Schedule

UNTOUCHED = "branches in every cheap step"
WAYS = 6  # of thinning, at most

Way = Callable[[Schedule], Schedule]
Rollout = Callable[[Schedule, int], Sequence[float]]  # schedule, seed -> mean squared error of each sample


def with_cached_branches(study: Study) -> Study:
    """Another study, in which rows that do not compute the experts compute some expert branches.

    It uses the drift of whole regions, which shows where full steps are needed; rollouts decide.

    Raises:
        ScheduleError: no experts region can be computed in part. The message gives the reasons.
    """
    regions = study.sampled.program.regions
    partial = Partial(0, study.request.branches)
    experts = [region for region in regions if region.kind == "experts"]
    divisible = {region.key for region in experts if isinstance(region.division, Divisible)}
    if not divisible:
        reasons = "; ".join(
            f"{region.key}: {region.division.reason}" for region in experts if isinstance(region.division, Indivisible)
        )
        raise ScheduleError(
            f"calibrate: branches={partial.tau:g}, but no experts can be taken apart by themselves at granularity "
            f"{study.granularity!r}: {reasons or 'it has no columns of experts'}. Leave branches out"
        )
    full = tuple(Action.COMPUTE for _ in regions)
    cheap = tuple(partial if key in divisible else Action.FORECAST for key in regions.keys)
    caching = Schedule((full, cheap), regions.keys, order=1, granularity=study.granularity)
    request = replace(study.request, predictors=predictors_of(1))
    branches = Study(
        study.model, study.sample, study.granularity, study.inner, request, study.report_progress, caching,
        study.goal,
    )  # fmt: skip
    branches.borrow(study)
    branches.drift, branches.split = study.drift, study.split
    return branches


def ways_of(regions: RegionMap) -> dict[str, Way]:
    """The ways of thinning a schedule of these regions, by name."""
    depth = 1 + max(region.layer for region in regions)
    experts = {column: region.layer for column, region in enumerate(regions) if region.kind == "experts"}
    ways: dict[str, Way] = {}
    for third, name in enumerate(("first", "middle", "last")):
        columns = frozenset(column for column, layer in experts.items() if 3 * layer // depth == third)
        if columns and len(columns) < len(experts):
            ways[f"{name} third of the layers as whole regions"] = partial(_without_branches_in, columns)
    return ways | {
        "branches in the first cheap step of each run": partial(_only_in, lambda index, length: index == 0),
        "branches in the last cheap step of each run": partial(_only_in, lambda index, length: index == length - 1),
        "branches in every second cheap step": partial(_only_in, lambda index, length: index % 2 == 1),
    }


def thin(
    schedule: Schedule, ways: Mapping[str, Way], rollout: Rollout, seeds: Sequence[int], raced: int, data_range: float
) -> BetterSchedule:
    """Apply the ways of thinning greedily, each one if it improves the samples of the first seeds.

    Args:
        schedule: with rows that compute a part of the branches.
        ways: by name.
        rollout: samples one seed with a schedule.
        seeds: on all of which the result must be better than `schedule`; otherwise `schedule` is returned.
        raced: how many of the seeds each way is rolled out on.
        data_range: of the samples, for the PSNR.

    Returns:
        The best schedule.
    """

    def quality(candidate: Schedule, count: int) -> float:
        return mean_psnr((rollout(candidate, seed) for seed in seeds[:count]), data_range)

    used: list[str] = []
    best, best_quality = schedule, quality(schedule, raced)
    tried = {UNTOUCHED: best_quality}
    for name, way in ways.items():
        candidate = way(best)
        if candidate.rows == best.rows:
            continue
        tried[name] = quality(candidate, raced)
        if tried[name] > best_quality + BETTER_DB:
            best, best_quality = candidate, tried[name]
            used.append(name)
    final_quality, untouched_quality = quality(best, len(seeds)), quality(schedule, len(seeds))
    if used and final_quality > untouched_quality + BETTER_DB:
        return BetterSchedule(best, tuple(used), final_quality, tried)
    return BetterSchedule(schedule, (), untouched_quality, tried)


def thinned(study: Study, plan: Plan) -> BetterSchedule:
    """Thin the schedule of a plan whose study caches branches; without `ways` if no thinning improves it."""
    sampled, program, seeds = study.sampled, study.sampled.program, study.request.seeds
    untouched = schedule_of(plan, program.regions.keys, sampled.kinds)
    errors: dict[tuple[Any, int], Sequence[float]] = {}

    def rollout(schedule: Schedule, seed: int) -> Sequence[float]:
        if schedule.rows == untouched.rows:
            return study.rollout(plan, seed)
        if (schedule.rows, seed) not in errors:
            study.report_progress(f"branches in part: rollout {len(errors) + 1}", 0.97)
            errors[schedule.rows, seed] = study.errors(seed, sampled.run(seed, schedule))
        return errors[schedule.rows, seed]

    begin = sampled.seconds
    result = thin(untouched, ways_of(program.regions), rollout, seeds, min(RACE_SEEDS, len(seeds)), study.data_range)
    study.seconds["thin"] = sampled.seconds - begin
    return with_costs(study, result)


def _without_branches_in(columns: frozenset[int], schedule: Schedule) -> Schedule:
    """The schedule with these columns forecast as whole regions."""
    return replace(schedule, rows=tuple(_forecast(row, columns) for row in schedule.rows))


def _only_in(selects: Callable[[int, int], bool], schedule: Schedule) -> Schedule:
    """The schedule with branches computed in the selected cheap steps only.

    selects: (index of a step in its run of cheap steps, length of the run) -> whether the step computes branches.
    """
    rows = list(schedule.rows)
    full = [step for step, row in enumerate(rows) if all(act is Action.COMPUTE for act in row)]
    for start, end in zip(full, [*full[1:], len(rows)], strict=True):
        for step in range(start + 1, end):
            if not selects(step - start - 1, end - start - 1):
                rows[step] = _forecast(rows[step], range(len(rows[step])))
    return replace(schedule, rows=tuple(rows))


def _forecast(row: Row, columns: Container[int]) -> Row:
    """The row with PARTIAL replaced by FORECAST in these columns."""
    acts = list(row)
    for column, act in enumerate(row):
        if column in columns and isinstance(act, Partial):
            acts[column] = Action.FORECAST
    return tuple(acts)
