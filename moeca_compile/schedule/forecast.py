"""Coefficients of a forecast: y = y0 + c0 (y0 - y1) + c1 (y1 - y2), y0 the latest output. Pure numbers, no torch."""

from __future__ import annotations

from collections.abc import Sequence

Coefficients = tuple[tuple[float, float], ...]  # (c0, c1) of each region


def newton(step: int, history: Sequence[int]) -> tuple[float, float]:
    """The coefficients of one region, by Newton's interpolating polynomial.

    Source: Stoer & Bulirsch, Introduction to Numerical Analysis, 2.1.3. With fewer than three outputs the polynomial
    has a lower order.

    Args:
        step: of the forecast.
        history: the steps that computed the outputs, latest first.

    Returns:
        (c0, c1), without unit.
    """
    if len(history) < 2:
        return 0.0, 0.0
    s0, s1, *older = history
    linear = (step - s0) / (s0 - s1)
    if not older:
        return linear, 0.0
    quadratic = (step - s0) * (step - s1) / (s0 - older[0])
    return linear + quadratic / (s0 - s1), -quadratic / (s1 - older[0])


def coefficients(step: int, histories: Sequence[Sequence[int]], terms: Sequence[int]) -> Coefficients:
    """The coefficients of every region.

    Args:
        step: of the forecast.
        histories: for each region the steps that computed it, latest first.
        terms: for each region how many of its outputs a forecast may use: 1 (reuse) to 3 (order 2).

    Returns:
        (c0, c1) for each region.
    """
    pairs: dict[tuple[int, ...], tuple[float, float]] = {}  # most regions were computed at the same steps
    table = []
    for history, count in zip(histories, terms, strict=True):
        steps = tuple(history[:count])
        if steps not in pairs:
            pairs[steps] = newton(step, steps)
        table.append(pairs[steps])
    return tuple(table)
