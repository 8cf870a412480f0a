"""Predictors: how a forecast follows from the last outputs of a region. A schedule's order names its predictor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.forecast import polynomial


@dataclass(frozen=True)
class Predictor:
    """The polynomial of one order through the last computed outputs (`schedule/forecast.py`).

    Attributes:
        name: in plans and reports.
        order: 0 (the last output), 1 or 2.
    """

    name: str
    order: int

    @property
    def terms(self) -> int:
        """How many outputs of a region the forecast uses."""
        return self.order + 1

    def weights(self, step: int, history: Sequence[int]) -> tuple[tuple[int, float], ...]:
        """The forecast at `step` as a weighted sum of outputs.

        Args:
            step: of the forecast.
            history: the steps that computed the region, latest first.

        Returns:
            (step of an output, weight) for each output whose weight is not 0; the weights sum to 1.
        """
        history = tuple(history)[: self.terms]
        weights = polynomial(step, history)
        return tuple((computed, weight) for computed, weight in zip(history, weights, strict=False) if weight)


ORDERS = tuple(Predictor(f"order-{order}", order) for order in range(3))
PREDICTORS = {predictor.name: predictor for predictor in ORDERS}


def predictors_of(order: int | str) -> tuple[Predictor, ...]:
    """The predictors for an order: all of them for `auto`, or the one of that number.

    Raises:
        ScheduleError: the order is neither.
    """
    if order == "auto":
        return ORDERS
    if isinstance(order, int) and not isinstance(order, bool) and 0 <= order < len(ORDERS):
        return (ORDERS[order],)
    raise ScheduleError(f"order is {order!r}, expected 0, 1, 2 or 'auto'")
