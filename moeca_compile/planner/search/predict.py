"""Predictors: what a forecast makes of a region's last outputs. One interface, so that the search can try any.

A predictor gives two numbers for a step, from the steps that were computed last: the forecast is
y0 + c0 (y0 - y1) + c1 (y1 - y2), with y0, y1, y2 the last outputs, latest first. Schedules run the three Newton ones
(`order-0` to `order-2`, the runtime's own); the others are tried in the search and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.forecast import newton

Coefficients = tuple[float, float]


@dataclass(frozen=True)
class Predictor:
    """`coefficients(step, seen)` gives c0 and c1; `seen`: the steps computed last, latest first, at most `keeps`.

    Attributes:
        order: what a schedule with this predictor says; None: schedules can't run it, it is only tried.
    """

    name: str
    keeps: int
    order: int | None
    coefficients: Callable[[int, Sequence[int]], Coefficients]

    def weights(self, step: int, seen: Sequence[int]) -> tuple[tuple[int, float], ...]:
        """The forecast as a weighted sum of outputs: (step it was computed at, weight), which add up to 1."""
        seen = tuple(seen)[: self.keeps]
        c0, c1 = self.coefficients(step, seen)
        raw = (1.0 + c0, c1 - c0, -c1)
        return tuple((at, weight) for at, weight in zip(seen, raw, strict=False) if weight)


def damped(step: int, seen: Sequence[int], share: float = 0.75) -> Coefficients:
    """A share of the linear extrapolation."""
    return share * newton(step, seen[:2])[0], 0.0


def hermite(step: int, seen: Sequence[int], contraction: float = 0.6) -> Coefficients:
    """Scaled Hermite polynomials in place of powers (HiCache, arXiv 2508.16984): s^i H_i(s x) / i!, x = step - s0."""
    if len(seen) < 2:
        return 0.0, 0.0
    x, s = step - seen[0], contraction
    first = s * 2 * s * x / (seen[0] - seen[1])
    if len(seen) < 3:
        return first, 0.0
    second = s * s * (4 * s * s * x * x - 2) / (seen[0] - seen[2])
    return first + second / (seen[0] - seen[1]), -second / (seen[1] - seen[2])


def damped_bend(step: int, seen: Sequence[int], share: float = 0.75) -> Coefficients:
    """The linear extrapolation and a share of what order 2 adds to it."""
    (line, _), (full, bend) = newton(step, seen[:2]), newton(step, seen)
    return line + share * (full - line), share * bend


def fitted_line(step: int, seen: Sequence[int]) -> Coefficients:
    """The least-squares line through the last three outputs, at `step`."""
    if len(seen) < 3:
        return newton(step, seen)
    middle = sum(seen) / 3
    slope = (step - middle) / sum((at - middle) ** 2 for at in seen)
    first, last = (1 / 3 + slope * (at - middle) for at in (seen[0], seen[2]))
    return first - 1, -last


ORDERS = tuple(Predictor(f"order-{order}", order + 1, order, newton) for order in range(3))
OTHERS = (
    Predictor("damped", 2, None, damped),
    Predictor("damped-bend", 3, None, damped_bend),
    Predictor("fitted-line", 3, None, fitted_line),
    Predictor("hermite", 3, None, hermite),
)
PREDICTORS = {predictor.name: predictor for predictor in (*ORDERS, *OTHERS)}


def predictors_of(order: int | str) -> tuple[Predictor, ...]:
    """`auto`: all orders; a number: that one.

    Raises:
        ScheduleError: neither.
    """
    if order == "auto":
        return ORDERS
    if isinstance(order, int) and not isinstance(order, bool) and 0 <= order < len(ORDERS):
        return (ORDERS[order],)
    raise ScheduleError(f"order is {order!r}, expected 0, 1, 2 or 'auto'")
