"""Steps by dynamic programming: of least error of forecasts (DPCache), or of Euler steps (GITS, Optimal Steps).

Written from the descriptions: Cui et al., arXiv 2602.22654 (a path-aware cost tensor on calibration samples, the steps
between are forecast); Chen et al., arXiv 2405.11326; Pei et al., arXiv 2503.21774.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def path(cost: np.ndarray, count: int) -> list[int]:
    """The computed steps of least cost; the first one is 0.

    Args:
        cost: of the steps between j and k where i was computed before j, (i, j, k) = (steps, steps, steps + 1);
            [0, 0, k] is that of the first step, which has none before it.
        count: of the computed steps.
    """
    steps = cost.shape[0]
    level = np.full((steps, steps), np.inf)
    level[0, 0] = 0.0
    before = []
    for _ in range(count - 1):
        through = level[:, :, None] + cost[:, :, :steps]
        before.append(through.argmin(axis=0))
        level = through.min(axis=0)
    last = level + cost[:, :, steps]
    older, newer = np.unravel_index(int(last.argmin()), last.shape)
    computed = [int(newer)]
    for choice in reversed(before):
        older, newer = choice[older, newer], older
        computed.append(int(newer))
    return computed[::-1]


def of_forecasts(gram: np.ndarray) -> np.ndarray:
    """DPCache's cost tensor: squared errors of a line through the outputs of two computed steps, summed over a gap.

    Args:
        gram: inner products of the outputs of all steps.
    """
    steps = len(gram)
    cost = np.full((steps, steps, steps + 1), np.inf)
    for newer in range(steps):
        for older in range(newer) if newer else (0,):
            total = 0.0
            cost[older, newer, newer + 1] = 0.0
            for step in range(newer + 1, steps):
                slope = (step - newer) / (newer - older) if newer else 0.0
                places = (step, newer, older)
                weights = np.array([1.0, -1.0 - slope, slope])
                total += float(weights @ gram[np.ix_(places, places)] @ weights)
                cost[older, newer, step + 1] = total
    return cost


def of_steps(states: Sequence[Tensor], outputs: Sequence[Tensor], order: int) -> np.ndarray:
    """The squared distance of one multistep step from where the known trajectory is then.

    Args:
        states: before each step and after the last.
        outputs: at each step.
        order: 0 for Euler's step, 1 for one along the line through the outputs of two computed steps.
    """
    steps = len(outputs)
    cost = np.full((steps, steps, steps + 1), np.inf)
    ends, velocities = (torch.stack(list(rows)).flatten(1).double() for rows in (states, outputs))
    for newer in range(steps):
        lengths = torch.arange(1, steps - newer + 1, dtype=torch.float64)[:, None] / steps
        gaps = ends[newer] - lengths * velocities[newer] - ends[newer + 1 :]
        for older in range(newer) if newer else (0,):
            slope = (velocities[newer] - velocities[older]) * steps / max(1, newer - older)
            bend = order * lengths.square() / 2 * slope
            cost[older, newer, newer + 1 :] = (gaps - bend).square().sum(1).numpy()
    return cost
