"""Which row comes next in an adaptive schedule: how far one stream drifted since it was computed. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeca_compile.schedule.adaptive import Adaptive


@dataclass(slots=True)
class Pace:
    """Of one stream. `spent`: drift since the last full step; `since`: steps since it; `full`: full steps so far."""

    spent: float = 0.0
    since: int = 0
    full: int = 0

    def choose(self, adaptive: Adaptive, step: int, figure: float | None) -> int:
        """The row of `step`, its place among the schedule's. `figure`: the last step's, None where there was none."""
        if figure is not None and self.since:
            self.spent += figure if math.isfinite(figure) else math.inf
        last = len(adaptive.thresholds)
        if step < adaptive.warmup or self.since >= adaptive.most or self.full < adaptive.floor * (step + 1):
            return 0
        reached = next((row for row, limit in enumerate(adaptive.thresholds) if self.spent >= limit), last)
        if reached == 0 and self.full + 1 > adaptive.ceiling * (step + 1):
            return min(1, last)
        return reached

    def ran(self, full: bool) -> None:
        """Note whether the step was a full one."""
        if full:
            self.spent, self.since, self.full = 0.0, 0, self.full + 1
        else:
            self.since += 1
