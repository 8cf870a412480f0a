"""The row of each step in an adaptive schedule, from how far the stream drifted since the last full step. No torch
here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeca_compile.schedule.adaptive import Adaptive


@dataclass(slots=True)
class Pace:
    """The adaptive state of one stream.

    Attributes:
        spent: sum of the drift metric since the last full step.
        since: steps since the last full step.
        full: full steps so far.
    """

    spent: float = 0.0
    since: int = 0
    full: int = 0

    def choose(self, adaptive: Adaptive, step: int, drift: float | None) -> int:
        """Choose the row of `step`.

        Args:
            adaptive: thresholds and limits of the schedule.
            step: number of the call, from 0.
            drift: drift metric that the last step measured; None: it measured none. A value that isn't finite asks for
                a full step.

        Returns:
            The row's index in the schedule; 0 is the full row.
        """
        if drift is not None and self.since:
            self.spent += drift if math.isfinite(drift) else math.inf
        last = len(adaptive.thresholds)
        if step < adaptive.warmup or self.since >= adaptive.most or self.full < adaptive.floor * (step + 1):
            return 0
        reached = next((row for row, limit in enumerate(adaptive.thresholds) if self.spent >= limit), last)
        if reached == 0 and self.full + 1 > adaptive.ceiling * (step + 1):
            return min(1, last)
        return reached

    def ran(self, full: bool) -> None:
        """Record whether the step ran the full row."""
        if full:
            self.spent, self.since, self.full = 0.0, 0, self.full + 1
        else:
            self.since += 1
