"""Fit a schedule to a graph's regions: which parts of them its PARTIAL rows can recompute. Pure data."""

from __future__ import annotations

from dataclasses import replace

from moeca_compile.errors import ScheduleError
from moeca_compile.graph.regions import Divisible, Indivisible, Region, RegionMap
from moeca_compile.schedule import Act, Action, Partial, Schedule


def fit(schedule: Schedule, regions: RegionMap, granularity: str = "") -> Schedule:
    """`schedule` bound to `regions`. Where a region has no branches and a PARTIAL recomputes none of its tokens, it is
    what it says: a FORECAST (order 0: a REUSE).

    Raises:
        ScheduleError: it is for another graph or granularity, it wants a part of a region that has none, or its control
            doesn't fit the experts.
    """
    bound = schedule.bind(regions.keys, regions.fingerprint, granularity)
    columns = [_column(bound, column, region) for column, region in enumerate(regions)]
    if any(bound.partials(column) for column in range(len(regions))):
        bound = replace(bound, rows=tuple(zip(*columns, strict=True)))
    _check_control(bound, regions)
    return bound


def _column(schedule: Schedule, column: int, region: Region) -> list[Act]:
    acts = [row[column] for row in schedule.rows]
    partials = schedule.partials(column)
    division = region.division
    has_branches = isinstance(division, Divisible) and division.branches is not None
    if partials and not has_branches and region.kind != "experts" and not any(act.rho for act in partials):
        without_part = Action.FORECAST if schedule.order else Action.REUSE
        return [without_part if isinstance(act, Partial) else act for act in acts]
    if partials and isinstance(division, Indivisible):
        raise ScheduleError(
            f"region {region.key} can't be recomputed in part ({partials[0]}): {division.reason}. Give it "
            "COMPUTE, REUSE or FORECAST"
        )
    return acts


def _check_control(schedule: Schedule, regions: RegionMap) -> None:
    experts = {}
    for region in regions:
        if isinstance(region.division, Divisible) and region.routers:
            experts[region.key] = region.routers[0].num_experts
    for name, table in schedule.control.tables.items():
        for key, weights in table.items():
            if key not in experts:
                raise ScheduleError(
                    f"control: {name} of {key!r}, which is no region with branches; those: {[*experts]}"
                )
            if len(weights) != experts[key]:
                raise ScheduleError(f"control: {name} of {key} has {len(weights)} numbers for {experts[key]} experts")
