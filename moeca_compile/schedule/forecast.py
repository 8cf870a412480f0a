"""What a forecast weighs a region's last outputs with: y0 + c0 (y0 - y1) + c1 (y1 - y2). Pure numbers, no torch."""

from __future__ import annotations

from collections.abc import Sequence


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
