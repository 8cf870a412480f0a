"""What a forecast weighs a region's last outputs with: y0 + c0 (y0 - y1) + c1 (y1 - y2). Pure numbers, no torch."""

from __future__ import annotations

from collections.abc import Sequence

Coefficients = tuple[tuple[float, float], ...]  # (c0, c1) of each region


def newton(step: int, seen: Sequence[int]) -> tuple[float, float]:
    """c0 and c1 for a forecast at `step` from outputs computed at the steps `seen`, latest first.

    Newton's interpolating polynomial through them (Stoer & Bulirsch, Introduction to Numerical Analysis, 2.1.3), of a
    lower order where fewer are known.
    """
    if len(seen) < 2:
        return 0.0, 0.0
    s0, s1, *rest = seen
    linear = (step - s0) / (s0 - s1)
    if not rest:
        return linear, 0.0
    bend = (step - s0) * (step - s1) / (s0 - rest[0])
    return linear + bend / (s0 - s1), -bend / (s1 - rest[0])


def coefficients(step: int, histories: Sequence[Sequence[int]], terms: Sequence[int]) -> Coefficients:
    """c0 and c1 of each region for a forecast at `step`.

    Args:
        histories: of each region, the steps that computed it, latest first.
        terms: of each region, how many of its outputs a forecast may take: 1 (reuse) to 3 (order 2).
    """
    pairs: dict[tuple[int, ...], tuple[float, float]] = {}  # most regions were computed at the same steps
    table = []
    for history, count in zip(histories, terms, strict=True):
        seen = tuple(history[:count])
        if seen not in pairs:
            pairs[seen] = newton(step, seen)
        table.append(pairs[seen])
    return tuple(table)
