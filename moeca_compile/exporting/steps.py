"""A schedule unrolled into a table of steps: which variant, and with which coefficients, for who can only count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeca_compile.errors import LoweringError
from moeca_compile.graph.variant import SLOTS, StateSlot
from moeca_compile.runtime.state import StreamState
from moeca_compile.schedule import Action, Schedule
from moeca_compile.schedule.forecast import Coefficients
from moeca_compile.schedule.forecast import coefficients as coefficients_at

NONE = (0.0, 0.0)
_KNOWN = {Action.COMPUTE, Action.REUSE, Action.FORECAST}


@dataclass(frozen=True)
class StepTable:
    """Step s is entry s while there are any, then the last `period` entries again and again.

    Attributes:
        variants: the number of the variant among the schedule's distinct rows, by entry.
        coefficients: by entry, c0 and c1 of each region (`schedule/forecast.py`).
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
        LoweringError: it forecasts over ever larger distances, so that no entries repeat; or has rows of another kind.
    """
    distinct, period = schedule.distinct_rows(), schedule.period
    if not all(action in _KNOWN for row in distinct for action in row):
        raise LoweringError("a fused graph holds rows of COMPUTE, REUSE and FORECAST alone: export with fused=False")
    depths = range(len(SLOTS) + 1)  # by then every region that a period computes has its whole history from periods
    end = len(schedule.rows) + period * len(depths)
    state = StreamState(tuple(layout), regions)
    variants, coefficients = [], []
    for step in range(end + period):
        row = schedule.rows[schedule.row_index(step) or 0]
        table = zip(coefficients_at(step, state.history, state.depths), row, strict=True)
        variants.append(distinct.index(row))
        coefficients.append(tuple(pair if action is Action.FORECAST else NONE for pair, action in table))
        computed = {region for region, action in enumerate(row) if action is Action.COMPUTE}
        writes = [i for i, slot in enumerate(layout) if slot.region in computed and slot.slot == SLOTS[0]]
        state.commit(step, row, writes, [None] * len(writes))
    if not period:
        return StepTable((*variants, 0), (*coefficients, (NONE,) * regions), 1, len(schedule.rows))
    if coefficients[end - period : end] != coefficients[end:]:
        raise LoweringError(
            "a region that is computed no more is forecast over ever larger distances, which no table of steps holds: "
            "export with fused=False, or with a schedule that reuses it"
        )
    return StepTable(tuple(variants[:end]), tuple(coefficients[:end]), period, None)
