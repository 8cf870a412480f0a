"""Predictors: exact on polynomials of their order, weights that add up to one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.search import predict
from moeca_compile.planner.search.predict import ORDERS, predictors_of

PASTS = st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True).map(lambda seen: sorted(seen, reverse=True))


@given(PASTS, st.integers(1, 8), st.tuples(*[st.integers(-3, 3)] * 3))
def test_order_n_forecasts_polynomials_of_degree_n(seen: list[int], ahead: int, factors: tuple[int, ...]) -> None:
    for predictor in ORDERS:
        degree = min(predictor.terms, len(seen)) - 1

        def value(step: int, degree: int = degree) -> float:
            return sum(factor * step**power for power, factor in enumerate(factors[: degree + 1]))

        step = seen[0] + ahead
        forecast = sum(weight * value(at) for at, weight in predictor.weights(step, seen))
        assert forecast == pytest.approx(value(step), abs=1e-6 * (1 + abs(value(step))))


@pytest.mark.parametrize("predictor", ORDERS, ids=lambda one: one.name)
@given(seen=PASTS, ahead=st.integers(1, 8))
def test_weights_add_up_to_one(predictor: predict.Predictor, seen: list[int], ahead: int) -> None:
    weights = predictor.weights(seen[0] + ahead, seen)
    assert sum(weight for _, weight in weights) == pytest.approx(1)
    assert {at for at, _ in weights} <= set(seen[: predictor.terms])


def test_which_orders_are_tried() -> None:
    assert predictors_of("auto") == ORDERS
    assert predictors_of(2) == (ORDERS[2],)
    for wrong in (3, -1, "1", True):
        with pytest.raises(ScheduleError, match="expected 0, 1, 2 or 'auto'"):
            predictors_of(wrong)
