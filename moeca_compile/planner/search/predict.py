"""Predictors: what a forecast makes of a region's last outputs. A schedule's order says which one it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.forecast import newton


@dataclass(frozen=True)
class Predictor:
    """The polynomial of one order through the outputs computed last (`schedule/forecast.py`).

    Attributes:
        name: in plans and reports.
        order: 0 (the last output), 1 or 2.
    """

    name: str
    order: int

    @property
    def keeps(self) -> int:
        """How many outputs of a region it takes."""
        return self.order + 1

    def weights(self, step: int, seen: Sequence[int]) -> tuple[tuple[int, float], ...]:
        """The forecast at `step` as a weighted sum of outputs.

        Args:
            seen: the steps that computed the region, latest first.

        Returns:
            (step of an output, its weight) for each output that counts; the weights add up to 1.
        """
        seen = tuple(seen)[: self.keeps]
        c0, c1 = newton(step, seen)
        weights = (1.0 + c0, c1 - c0, -c1)
        return tuple((at, weight) for at, weight in zip(seen, weights, strict=False) if weight)


ORDERS = tuple(Predictor(f"order-{order}", order) for order in range(3))
PREDICTORS = {predictor.name: predictor for predictor in ORDERS}


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
