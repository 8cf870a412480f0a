"""Spectrum's forecast: a ridge regression of all computed outputs on Chebyshev polynomials of the step.

Written from the description (arXiv 2603.01623): the error doesn't grow with the gap as a Taylor series' does; computed
steps get rarer from step to step. Applied to the guided output of the model.
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import chebyshev

from benchmarks.peers.equal.multistep import Weigh


def weigher(steps: int, degree: int, ridge: float, local: float) -> Weigh:
    """Weights of all computed outputs.

    Args:
        steps: of the run.
        degree: of the polynomials.
        ridge: of the regression.
        local: share of the line through the last two outputs in the forecast; the rest is the regression's.
    """

    def basis(at: np.ndarray) -> np.ndarray:
        return np.asarray(chebyshev.chebvander(2 * at / (steps - 1) - 1, degree))

    def weigh(known: tuple[int, ...], step: int) -> np.ndarray:
        line = np.zeros(len(known))
        if step == known[0] or len(known) == 1:
            line[0] = 1.0
            return line
        slope = (step - known[0]) / (known[0] - known[1])
        line[:2] = 1 + slope, -slope
        design = basis(np.array(known, dtype=float))
        normal = design.T @ design + ridge * np.eye(degree + 1)
        regression = basis(np.array([float(step)]))[0] @ np.linalg.solve(normal, design.T)
        return np.asarray(local * line + (1 - local) * regression)

    return weigh


def growing(steps: int, count: int, warmup: int) -> list[int]:
    """`warmup` computed steps, then gaps that grow by the same amount from one to the next."""
    rest = count - warmup
    if rest <= 0:
        return list(range(count))
    places = np.arange(1, rest + 1)
    room = steps - warmup
    first = 2.0 if 2 * (rest + 1) <= room else room / (rest + 1)
    growth = max(0.0, 2 * (room - first * (rest + 1)) / (rest * (rest + 1)))
    rarer = [round(warmup - 1 + first * place + growth * place * (place - 1) / 2) for place in places]
    return [*range(warmup), *sorted({min(step, steps - 1) for step in rarer if step >= warmup})]
