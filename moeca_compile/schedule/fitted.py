"""Fitted weights: for each step and region, weights of its kept values, fitted offline. Pure data, no torch.

A FORECAST is a weighted sum of the region's last outputs, y0 (the latest) to y3. By the schedule's order the weights
are those of a polynomial. A schedule may bring weights of its own instead, one list for each step and column.
They are made for the steps of this schedule, in their order: elsewhere the polynomial serves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.action import Action, Partial, Row, name_of
from moeca_compile.schedule.decode import Entries
from moeca_compile.schedule.forecast import MAX_KEPT, Weights
from moeca_compile.schedule.output import TRUTHS


@dataclass(frozen=True)
class FittedWeights:
    """Weights of FORECAST, by step and region.

    Attributes:
        weights: [steps][regions], of each up to four weights, of y0 to y3, without unit; none: the polynomial's. A
            region keeps as many values as it has weights at any step.
        truth: what they were fitted to, as in `OutputRule`.

    Raises:
        ScheduleError: too many weights, a weight that isn't finite, an unknown truth.
    """

    weights: tuple[tuple[Weights, ...], ...]
    truth: str = "uncached"

    def __post_init__(self) -> None:
        for step, row in enumerate(self.weights):
            for column, cell in enumerate(row):
                if len(cell) > MAX_KEPT:
                    raise ScheduleError(
                        f"fitted: step {step}, column {column} has {len(cell)} weights, at most {MAX_KEPT} values are "
                        "kept of a region"
                    )
                if not all(map(math.isfinite, cell)):
                    raise ScheduleError(f"fitted: step {step}, column {column} has a weight that isn't finite")
        if self.truth not in TRUTHS:
            raise ScheduleError(f"fitted: truth is {self.truth!r}, expected one of {', '.join(TRUTHS)}")

    def __str__(self) -> str:
        """For people."""
        steps, kept = sum(any(row) for row in self.weights), max(len(cell) for row in self.weights for cell in row)
        return f"at {steps} steps, over up to {kept} outputs of a region, fitted to {self.truth} samples"

    def check_rows(self, rows: Sequence[Row], is_open: bool, has_regions: bool) -> None:
        """Check that the weights fit a schedule.

        Args:
            rows: of the schedule.
            is_open: whether it repeats or adapts, so that its steps aren't known.
            has_regions: whether its columns are the regions of a graph.

        Raises:
            ScheduleError: they don't fit; the text names the step and the column.
        """
        if is_open or not has_regions or len(self.weights) != len(rows):
            raise ScheduleError(
                f"fitted: weights of {len(self.weights)} steps for {len(rows)} rows. It takes weights for each step, "
                "and a schedule with regions that neither repeats nor adapts"
            )
        computed = [0] * len(rows[0])
        aging = {column for row in rows for column, action in enumerate(row) if isinstance(action, Partial)}
        for step, (row, cells) in enumerate(zip(rows, self.weights, strict=True)):
            if len(cells) != len(row):
                raise ScheduleError(f"fitted: step {step} has weights for {len(cells)} regions, there are {len(row)}")
            for column, (action, cell) in enumerate(zip(row, cells, strict=True)):
                if cell and (action is not Action.FORECAST or column in aging):
                    what = "of a region that is computed in part" if column in aging else f"at {name_of(action)}"
                    raise ScheduleError(
                        f"fitted: step {step}, column {column} has weights {what}: they are for FORECAST of whole "
                        "regions"
                    )
                if len(cell) > computed[column]:
                    raise ScheduleError(
                        f"fitted: step {step}, column {column} weighs y{len(cell) - 1}, but the region was computed "
                        f"{computed[column]} times by then"
                    )
                computed[column] += action is Action.COMPUTE

    def depth(self, column: int) -> int:
        """How many values of a region are kept for the weights.

        Args:
            column: the region's index.

        Returns:
            0 to 4.
        """
        return max(len(row[column]) for row in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_entries` reads it."""
        return {"truth": self.truth, "weights": [[list(cell) for cell in row] for row in self.weights]}

    @classmethod
    def from_entries(cls, data: Entries) -> FittedWeights:
        """Read `to_dict`'s entries.

        Raises:
            ScheduleError: an entry is missing or malformed.
        """
        data.reject_unknown(("truth", "weights"))
        rows = data.get("weights")
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise ScheduleError("fitted: weights is no list of rows, each a list of lists")
        weights = [tuple(Entries({"weights": cell}, "fitted").numbers("weights") for cell in row) for row in rows]
        return cls(tuple(weights), data.text("truth"))
