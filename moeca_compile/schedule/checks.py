"""What holds for the rows of every schedule."""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.action import Action, Row, legend_of

MAX_ORDER = 2
MAX_INTERVAL = 10  # of a schedule for a speedup: far from the last computed step a forecast is worth little
NEARLY = 0.95  # of a speedup: an interval that reaches so much of it is taken
MAX_ROWS = 10_000  # far beyond any sampler's steps; the limit keeps making and reading a schedule fast


def check_rows(rows: Sequence[Row], width: int, order: int, period: int) -> None:
    """Check a schedule's table.

    Args:
        rows: one per step.
        width: how many columns they must have.
        order: of the forecast.
        period: how many of the last rows repeat.

    Raises:
        ScheduleError: says what is wrong, and in which row.
    """
    if not rows:
        raise ScheduleError("a schedule needs at least one row")
    if len(rows) > MAX_ROWS:
        raise ScheduleError(f"a schedule has at most {MAX_ROWS} rows, this one has {len(rows)}")
    for step, row in enumerate(rows):
        if len(row) != width:
            raise ScheduleError(f"row {step} has {len(row)} actions, expected {width} (one a region)")
    if any(action is not Action.COMPUTE for action in rows[0]):
        raise ScheduleError("row 0 must be all COMPUTE: nothing can be reused before it was computed")
    if not 0 <= order <= MAX_ORDER:
        raise ScheduleError(f"order is {order}, expected 0, 1 or 2")
    legend_of(rows)
    if order == 0 and any(Action.FORECAST in row for row in rows):
        raise ScheduleError("FORECAST needs order 1 or 2; with order 0 the action is REUSE")
    if not 0 <= period <= len(rows):
        raise ScheduleError(f"period is {period}, but there are {len(rows)} rows")


def interval_for(speedup: float, cheap: float) -> int:
    """The smallest interval n of a uniform schedule that reaches a speedup in MACs, or misses it by at most 5 %.

    Of n steps one is computed, so n steps run 1 + (n - 1) `cheap` times the MACs of a computed step.

    Args:
        speedup: n / (1 + (n - 1) `cheap`), at least. Intervals are far apart, and every model computes something in a
            cheap step: without the 5 %, a speedup of 2 would always become interval 3.
        cheap: MACs of a step that computes no region / MACs of a computed step.

    Raises:
        ScheduleError: no interval up to `MAX_INTERVAL` reaches it.
    """
    reached = {n: n / (1 + (n - 1) * cheap) for n in range(2, MAX_INTERVAL + 1)}
    for interval, times in reached.items():
        if times >= NEARLY * speedup:
            return interval
    raise ScheduleError(
        f"speedup:{speedup:g} can't be reached: a step that computes no region still runs {cheap:.1%} of the MACs, so "
        f"uniform:{MAX_INTERVAL} gives {reached[MAX_INTERVAL]:.2f}. Ask for less, or calibrate a schedule "
        "(moeca_compile.calibrate); with granularity='output' cheap steps run nothing"
    )
