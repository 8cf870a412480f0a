"""Both kinds of cheap row in one schedule: layers that need no branch cache, cheap steps that need no branch computed.

A schedule by branches computes some of them in every layer of every cheap step. Thinned, a third of the layers is
cached as whole regions, or only some of the cheap steps after a full one compute branches. Nobody can estimate what
that does to the samples, so each way is sampled, and kept where the samples are better.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from moeca_compile.graph.regions import RegionMap
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import Plan, schedule_of
from moeca_compile.planner.search.search import RACE_SEEDS
from moeca_compile.planner.study import Study
from moeca_compile.schedule import Action, Partial, Row, Schedule

UNTOUCHED = "branches in every cheap step"
BETTER_DB = 0.02  # less is not worth another kind of row

Way = Callable[[Schedule], Schedule]
Rollout = Callable[[Schedule, int], Sequence[float]]  # schedule, seed -> of each sample the mean squared error


@dataclass(frozen=True)
class Thinned:
    """The schedule that came out, by which ways, and its quality on all seeds; of every way that was tried, what the
    samples of the raced seeds were with it; in dB. Of the schedule, as in `Costs`: its MACs and its state."""

    schedule: Schedule
    ways: tuple[str, ...]
    quality: float
    tried: Mapping[str, float]
    mac_fraction: float = 1.0
    state_bytes: int = 0


def ways_of(regions: RegionMap) -> dict[str, Way]:
    """By name, each way of leaving branches out that `regions` know."""
    depth = 1 + max(region.layer for region in regions)
    experts = {c: region.layer for c, region in enumerate(regions) if region.kind == "experts"}
    thirds = {
        name: frozenset(column for column, layer in experts.items() if 3 * layer // depth == number)
        for number, name in enumerate(("first", "middle", "last"))
    }
    return {
        **{
            f"{name} third of the layers as whole regions": partial(_without, columns)
            for name, columns in thirds.items()
            if columns and len(columns) < len(experts)
        },
        "branches in the first cheap step of each run": partial(_only, lambda place, length: place == 0),
        "branches in the last cheap step of each run": partial(_only, lambda place, length: place == length - 1),
        "branches in every second cheap step": partial(_only, lambda place, length: place % 2 == 1),
    }


def thin(
    schedule: Schedule, ways: Mapping[str, Way], rollout: Rollout, seeds: Sequence[int], raced: int, data_range: float
) -> Thinned:
    """Take one way after the other, each where it makes the samples of the first `raced` seeds better; all of them, or
    none where those of all seeds aren't.

    `schedule`: with rows that compute a part of the branches.
    """

    def quality(one: Schedule, count: int) -> float:
        return mean_psnr((rollout(one, seed) for seed in seeds[:count]), data_range)

    taken: list[str] = []
    before, best = schedule, quality(schedule, raced)
    tried = {UNTOUCHED: best}
    for name, way in ways.items():
        other = way(schedule)
        if other.rows == schedule.rows:
            continue
        found = tried[name] = quality(other, raced)
        if found > best + BETTER_DB:
            schedule, best = other, found
            taken.append(name)
    after, untouched = (quality(one, len(seeds)) for one in (schedule, before))
    if taken and after > untouched + BETTER_DB:
        return Thinned(schedule, tuple(taken), after, tried)
    return Thinned(before, (), untouched, tried)


def thinned(study: Study, plan: Plan) -> Thinned:
    """The best way that was found of thinning a plan of a study by branches; no way: as it is, it is best."""
    sampled, program, seeds = study.sampled, study.sampled.program, study.request.seeds
    whole = schedule_of(plan, program.regions.keys, sampled.kinds)
    errors: dict[tuple[Any, int], Sequence[float]] = {}

    def rollout(schedule: Schedule, seed: int) -> Sequence[float]:
        if schedule.rows == whole.rows:
            return study.rollout(plan, seed)
        if (schedule.rows, seed) not in errors:
            study.tick(f"branches in part: rollout {len(errors) + 1}", 0.97)
            errors[schedule.rows, seed] = study.errors(seed, sampled.run(seed, schedule))
        return errors[schedule.rows, seed]

    before = sampled.seconds
    found = thin(whole, ways_of(program.regions), rollout, seeds, min(RACE_SEEDS, len(seeds)), study.data_range)
    study.seconds["thin"] = sampled.seconds - before
    compiled = program.compiled(found.schedule)
    macs = [compiled.variants.variant(row).macs for row in found.schedule.rows]
    state = sum(slot.bytes for slot in compiled.layout)
    return replace(found, mac_fraction=sum(macs) / (macs[0] * len(macs)), state_bytes=state)


def _without(columns: frozenset[int], schedule: Schedule) -> Schedule:
    """These columns forecast as a whole where a part of them was computed."""
    return replace(schedule, rows=tuple(_forecast(row, columns) for row in schedule.rows))


def _only(keeps: Callable[[int, int], bool], schedule: Schedule) -> Schedule:
    """Branches are computed in those steps alone that `keeps` by their place in a run of steps that aren't full."""
    rows = list(schedule.rows)
    full = [step for step, row in enumerate(rows) if all(act is Action.COMPUTE for act in row)]
    for start, end in zip(full, [*full[1:], len(rows)], strict=True):
        for step in range(start + 1, end):
            if not keeps(step - start - 1, end - start - 1):
                rows[step] = _forecast(rows[step], range(len(rows[step])))
    return replace(schedule, rows=tuple(rows))


def _forecast(row: Row, columns: Container[int]) -> Row:
    """The row with a forecast in these columns where a part was computed."""
    return tuple(
        Action.FORECAST if column in columns and isinstance(act, Partial) else act for column, act in enumerate(row)
    )
