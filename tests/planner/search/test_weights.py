"""Weights fitted to displacements: exact where a polynomial isn't, worth less where outputs only wander."""

from __future__ import annotations

import numpy as np
import pytest

from moeca_compile.planner.search.drift import Drift, pairs_of
from moeca_compile.planner.search.rows import Plan, row_kinds
from moeca_compile.planner.search.weights import fitted_forecasts
from moeca_compile.schedule.forecast import polynomial

STEPS, SAMPLES, NUMBERS = 9, 4, 6
KINDS = row_kinds(("attention", "experts"), (0, 0))
RATES = (0.7, 0.85)  # by which the outputs of the two columns shrink from step to step


def drift_of(y: np.ndarray, lookback: int = STEPS) -> Drift:
    """Of outputs [atoms, steps, samples, numbers] that the latent is the plain sum of."""
    pairs = pairs_of(STEPS, lookback)
    parts = np.stack([y[:, a] - y[:, s] for a, s in pairs], axis=1).astype(np.float32)
    return Drift(STEPS, {pair: n for n, pair in enumerate(pairs)}, tuple((atom,) for atom in range(len(y))), parts)


def decaying(rates: tuple[float, ...] = RATES) -> np.ndarray:
    """Outputs that decay by a constant factor, from values of their own toward values of their own."""
    dice = np.random.default_rng(0)
    begin, end = dice.normal(size=(2, len(rates), 1, SAMPLES, NUMBERS))
    powers = np.array(rates)[:, None] ** np.arange(STEPS)
    return np.asarray(end + begin * powers[:, :, None, None])


@pytest.mark.parametrize("letters", ["CCFCFFCFF", "CCAFCXFAF"])
def test_a_decay_is_forecast_exactly_by_two_values(letters: str) -> None:
    found = fitted_forecasts(drift_of(decaying()), Plan(letters, "order-1"), KINDS, most=2)
    assert found is not None
    assert found.quality > found.polynomial + 40
    histories: list[list[int]] = [[], []]
    for step, letter in enumerate(letters):
        for column, rate in enumerate(RATES):
            history, cell = histories[column], found.weights[step][column]
            if KINDS[letter][column] is not None:
                assert cell == ()
                history.insert(0, step)
                continue
            newer, older = history[:2]
            back = (rate**step - rate**newer) / (rate**older - rate**newer)
            assert cell == pytest.approx((1 - back, back), abs=2e-3)


def test_a_first_value_alone_has_no_weights_of_its_own() -> None:
    found = fitted_forecasts(drift_of(decaying()), Plan("CFFCFFCFF", "order-1"), KINDS)
    assert found is not None
    assert found.weights[1] == found.weights[2] == ((), ())
    assert all(len(found.weights[step][column]) >= 2 for step in (4, 5, 7, 8) for column in (0, 1))


def test_weights_sum_to_one() -> None:
    wandering = np.random.default_rng(1).normal(size=(2, STEPS, SAMPLES, NUMBERS)).cumsum(axis=1)
    found = fitted_forecasts(drift_of(wandering), Plan("CCFCFFCFF", "order-2"), KINDS)
    assert found is not None
    cells = [cell for row in found.weights for cell in row if cell]
    assert cells
    assert [sum(cell) for cell in cells] == pytest.approx([1.0] * len(cells))


def test_outputs_on_a_line_keep_the_weights_of_the_line() -> None:
    line = np.arange(STEPS)[None, :, None, None] * np.ones((2, 1, SAMPLES, NUMBERS))
    letters = "CCFCFFCFF"
    found = fitted_forecasts(drift_of(line), Plan(letters, "order-1"), KINDS, most=2)
    assert found is not None
    history: list[int] = []
    for step, letter in enumerate(letters):
        if letter == "C":
            history.insert(0, step)
        else:
            assert found.weights[step][0] == pytest.approx(polynomial(step, history[:2])[:2], abs=1e-5)


def test_a_step_makes_up_for_those_before_it() -> None:
    """Two cheap steps with a single value are off; the next ones make up for it, so none is exact by itself."""
    rate = 0.7
    plan = Plan("CFFCFFCFF", "order-1")
    found = fitted_forecasts(drift_of(decaying((rate, rate))), plan, KINDS, most=2)
    assert found is not None
    exact = (rate**4 - rate**3) / (rate**0 - rate**3)
    assert found.weights[4][0] != pytest.approx((1 - exact, exact), abs=0.05)
    assert found.quality > found.polynomial + 5


def test_without_enough_to_go_by_there_are_none() -> None:
    plan, y = Plan("CCFCFFCFF", "order-1"), decaying()
    assert fitted_forecasts(drift_of(y), plan, KINDS, most=1) is None
    assert fitted_forecasts(drift_of(y[:, :, :1]), plan, KINDS) is None
    assert fitted_forecasts(drift_of(y, lookback=2), Plan("CCFFFFFFF", "order-1"), KINDS) is None
