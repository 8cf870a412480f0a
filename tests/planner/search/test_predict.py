"""Predictors: exact on polynomials of their order, the runtime's own numbers, weights that add up to one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.search import predict
from moeca_compile.planner.search.predict import ORDERS, OTHERS, predictors_of
from moeca_compile.schedule import forecast

PASTS = st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True).map(lambda seen: sorted(seen, reverse=True))


@given(PASTS, st.integers(1, 8))
def test_orders_are_the_runtimes(seen: list[int], ahead: int) -> None:
    for predictor in ORDERS:
        kept = seen[: predictor.keeps]
        assert predictor.coefficients(seen[0] + ahead, kept) == forecast.newton(seen[0] + ahead, kept)


@given(PASTS, st.integers(1, 8), st.tuples(*[st.integers(-3, 3)] * 3))
def test_order_n_forecasts_polynomials_of_degree_n(seen: list[int], ahead: int, factors: tuple[int, ...]) -> None:
    for predictor in ORDERS:
        degree = min(predictor.keeps, len(seen)) - 1

        def value(step: int, degree: int = degree) -> float:
            return sum(factor * step**power for power, factor in enumerate(factors[: degree + 1]))

        step = seen[0] + ahead
        forecast = sum(weight * value(at) for at, weight in predictor.weights(step, seen))
        assert forecast == pytest.approx(value(step), abs=1e-6 * (1 + abs(value(step))))


@pytest.mark.parametrize("predictor", [*ORDERS, *OTHERS], ids=lambda one: one.name)
@given(seen=PASTS, ahead=st.integers(1, 8))
def test_weights_add_up_to_one(predictor: predict.Predictor, seen: list[int], ahead: int) -> None:
    weights = predictor.weights(seen[0] + ahead, seen)
    assert sum(weight for _, weight in weights) == pytest.approx(1)
    assert {at for at, _ in weights} <= set(seen[: predictor.keeps])


def test_damped_and_hermite_go_less_far_than_the_line() -> None:
    line, _ = forecast.newton(7, (5, 3))
    assert predict.damped(7, (5, 3))[0] == pytest.approx(0.75 * line)
    assert predict.hermite(7, (5, 3))[0] == pytest.approx(2 * 0.6**2 * line)
    # full contraction 1/sqrt(2) leaves the line as it is
    assert predict.hermite(7, (5, 3), contraction=0.5**0.5)[0] == pytest.approx(line)


def test_a_damped_bend_lies_between_the_orders() -> None:
    seen = (9, 7, 4)
    one, two = forecast.newton(12, seen[:2]), forecast.newton(12, seen)
    for share, expected in ((0.0, one), (1.0, two)):
        assert predict.damped_bend(12, seen, share) == pytest.approx(expected)


@given(st.tuples(*[st.integers(-5, 5)] * 3))
def test_the_fitted_line_is_numpys(values: tuple[int, int, int]) -> None:
    seen = (9, 7, 4)
    c0, c1 = predict.fitted_line(12, seen)
    y0, y1, y2 = values
    fit = np.polynomial.Polynomial.fit(seen, values, 1)
    assert y0 + c0 * (y0 - y1) + c1 * (y1 - y2) == pytest.approx(fit(12), abs=1e-9)
    assert predict.fitted_line(12, seen[:2]) == forecast.newton(12, seen[:2])


def test_which_orders_are_tried() -> None:
    assert predictors_of("auto") == ORDERS
    assert predictors_of(2) == (ORDERS[2],)
    for wrong in (3, -1, "1", True):
        with pytest.raises(ScheduleError, match="expected 0, 1, 2 or 'auto'"):
            predictors_of(wrong)
