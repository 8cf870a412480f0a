"""Which steps to compute in full: a dynamic program over the errors of forecasts from uncached outputs.

A forecast of order 1 at step s depends on the last two computed steps (p, a), so the state of the program is that pair,
and its result is optimal for the given errors. These errors are teacher-forced: they do not include that later steps
start from the errors of earlier ones. The plan is therefore a start for `search`, not its result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# (p, a, s) -> error of the model's output at s, forecast from a and p; p = -1: from a alone
Errors = Mapping[tuple[int, int, int], float]


def best_refreshes(errors: Errors, steps: int, count: int, max_gap: int) -> tuple[int, ...] | None:
    """The `count` steps to compute, 0 among them, with the least summed error; None: `max_gap` is too short."""
    segments: dict[tuple[int, int, int], float] = {}

    def segment(p: int, a: int, b: int) -> float:
        """Error of the steps between a and b."""
        if (p, a, b) not in segments:
            segments[p, a, b] = sum(errors.get((p, a, s), math.inf) for s in range(a + 1, b))
        return segments[p, a, b]

    # best[a, p] = (error so far, computed steps), the last two of which are p and a
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, -1): (0.0, (0,))}
    for _ in range(count - 1):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (a, p), (error, chain) in best.items():
            for b in range(a + 1, min(steps, a + max_gap + 1)):
                candidate = error + segment(p, a, b)
                if candidate < longer.get((b, a), (math.inf, ()))[0]:
                    longer[b, a] = (candidate, (*chain, b))
        best = longer
    ends = [(error + segment(p, a, steps), chain) for (a, p), (error, chain) in best.items() if steps - a <= max_gap]
    error, chain = min(ends, default=(math.inf, ()))
    return chain if math.isfinite(error) else None


def plan_of(refreshes: tuple[int, ...], steps: int) -> str:
    """The letters of a plan that computes these steps and forecasts the others."""
    return "".join("C" if step in refreshes else "F" for step in range(steps))
