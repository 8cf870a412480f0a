"""Weights of a forecast: y = w0 y0 + w1 y1 + ..., y0 the latest output. Pure numbers, no torch."""

from __future__ import annotations

from collections.abc import Sequence

MAX_KEPT = 4  # values of a region that a forecast weighs
Weights = tuple[float, ...]  # of y0, y1, y2, y3, without unit
Coefficients = tuple[Weights, ...]  # of each region

NOTHING: Weights = (0.0,) * MAX_KEPT
COPY: Weights = (1.0, *NOTHING[1:])


def polynomial(step: int, history: Sequence[int]) -> Weights:
    """The weights of one region, by Lagrange's form of the interpolating polynomial on the step index.

    Source: Stoer & Bulirsch, Introduction to Numerical Analysis, 2.1.1.

    Args:
        step: of the forecast.
        history: the steps that computed the outputs, latest first, at most `MAX_KEPT`; none: `COPY`.

    Returns:
        `MAX_KEPT` weights, which sum to 1; those past the history are 0.
    """
    if not history:
        return COPY
    weights = []
    for own in history:
        weight = 1.0
        for other in history:
            if other != own:
                weight *= (step - other) / (own - other)
        weights.append(weight)
    return padded(weights)


def padded(weights: Sequence[float]) -> Weights:
    """The weights with a 0 for each value past them, `MAX_KEPT` in all."""
    return (*weights, *NOTHING[len(weights) :])


def coefficients(step: int, histories: Sequence[Sequence[int]], terms: Sequence[int]) -> Coefficients:
    """The polynomial's weights of every region.

    Args:
        step: of the forecast.
        histories: for each region the steps that computed it, latest first.
        terms: for each region how many of its outputs a forecast may use: 1 (reuse) to 3 (order 2).

    Returns:
        `MAX_KEPT` weights for each region.
    """
    by_steps: dict[tuple[int, ...], Weights] = {}  # most regions were computed at the same steps
    table = []
    for history, count in zip(histories, terms, strict=True):
        steps = tuple(history[:count])
        if steps not in by_steps:
            by_steps[steps] = polynomial(step, steps)
        table.append(by_steps[steps])
    return tuple(table)
