"""Which steps to compute in full: a dynamic programme over the errors of forecasts that start from true values.

A forecast of order 1 at step s depends on the last two computed steps (p, a), so the programme's state is that pair,
and for the errors it is given its answer is exact. They are teacher-forced errors, though: they leave out that later
steps start from what earlier ones got wrong. The plan is therefore a start for `search`, not an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# (p, a, s) -> how far the model's output at s is off, forecast from a and p; p = -1: only a is known
Errors = Mapping[tuple[int, int, int], float]


def best_refreshes(errors: Errors, steps: int, count: int, max_gap: int) -> tuple[int, ...] | None:
    """The `count` steps to compute (0 among them) of least summed error; None if gaps up to `max_gap` can't do it."""
    segments: dict[tuple[int, int, int], float] = {}

    def segment(p: int, a: int, b: int) -> float:
        """Error of the steps between a and b."""
        if (p, a, b) not in segments:
            segments[p, a, b] = sum(errors.get((p, a, s), math.inf) for s in range(a + 1, b))
        return segments[p, a, b]

    # best[a, p] = (error so far, chain of refreshes), the last two being p and a
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, -1): (0.0, (0,))}
    for _ in range(count - 1):
        further: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (a, p), (error, chain) in best.items():
            for b in range(a + 1, min(steps, a + max_gap + 1)):
                candidate = error + segment(p, a, b)
                if candidate < further.get((b, a), (math.inf, ()))[0]:
                    further[b, a] = (candidate, (*chain, b))
        best = further
    ends = [(error + segment(p, a, steps), chain) for (a, p), (error, chain) in best.items() if steps - a <= max_gap]
    error, chain = min(ends, default=(math.inf, ()))
    return chain if math.isfinite(error) else None


def plan_of(refreshes: tuple[int, ...], steps: int) -> str:
    """The plan that computes these steps and forecasts the others."""
    return "".join("C" if step in refreshes else "F" for step in range(steps))
