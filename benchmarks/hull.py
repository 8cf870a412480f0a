"""The upper concave hull of points (cost, quality): what mixing the best of them could give at any cost between."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def hull_of(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper concave hull, by rising cost."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        while len(hull) > 1 and _turn(hull[-2], hull[-1], (x, y)) >= 0:
            hull.pop()
        hull.append((x, y))
    return hull


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def on_hull(hull: Sequence[tuple[float, float]], macs: float) -> float | None:
    """The best that `macs` buy: the hull's height there, or what fewer give; None outside the hull."""
    for (x0, y0), (x1, y1) in itertools.pairwise(hull):
        if x0 <= macs <= x1:
            return max(y0, y0 + (y1 - y0) * (macs - x0) / (x1 - x0))
    return None
