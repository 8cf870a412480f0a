"""A schedule unrolled into a table of steps: which variant, and with which coefficients, for who can only count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeca_compile.errors import LoweringError
from moeca_compile.graph.variant import SLOTS, StateSlot
from moeca_compile.runtime.driver import StepDriver
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Action, Schedule
from moeca_compile.schedule.forecast import NOTHING, Coefficients


@dataclass(frozen=True)
class StepTable:
    """Step s is entry s while there are any, then the last `period` entries again and again.

    Attributes:
        variants: the number of the variant among the schedule's distinct rows, by entry.
        coefficients: by entry, the weights of each region's kept values (`schedule/forecast.py`).
        period: at least 1. A schedule that ends goes on with an entry that computes everything.
        steps: how many steps the schedule has; None: any number.
    """

    variants: tuple[int, ...]
    coefficients: tuple[Coefficients, ...]
    period: int
    steps: int | None


def step_table(schedule: Schedule, layout: Sequence[StateSlot], regions: int) -> StepTable:
    """Unroll a schedule.

    Raises:
        LoweringError: it forecasts over ever larger distances, so that no entries repeat.
    """
    distinct, period = schedule.distinct_rows(), schedule.period
    state, driver = StreamState(tuple(layout), regions), StepDriver(schedule, Warned())
    # after that many periods every region that a period computes has its whole history from periods
    end = len(schedule.rows) + period * (1 + max(state.depths, default=0))
    variants, coefficients = [], []
    for step in range(end + period):
        row = driver.choose(state, step, schedule.timesteps[step] if schedule.timesteps else None).row
        table = zip(driver.coefficients(state, step), row, strict=True)
        variants.append(distinct.index(row))
        coefficients.append(tuple(weights if action is Action.FORECAST else NOTHING for weights, action in table))
        computed = {region for region, action in enumerate(row) if action is Action.COMPUTE}
        writes = [i for i, slot in enumerate(layout) if slot.region in computed and slot.slot == SLOTS[0]]
        driver.keep(state, step, row, writes, [None] * len(writes))
    if not period:
        return StepTable((*variants, 0), (*coefficients, (NOTHING,) * regions), 1, len(schedule.rows))
    if coefficients[end - period : end] != coefficients[end:]:
        raise LoweringError(
            "a region that is computed no more is forecast over ever larger distances, which no table of steps holds: "
            "export with fused=False, or with a schedule that reuses it"
        )
    return StepTable(tuple(variants[:end]), tuple(coefficients[:end]), period, None)
