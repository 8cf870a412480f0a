"""The estimate against the sum it stands for, and that a signed sum beats a sum of norms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moeca_compile.planner.search.drift import Drift, extended, pairs_of
from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.planner.search.refresh import best_refreshes
from moeca_compile.planner.search.rows import Plan, row_kinds

STEPS, SAMPLES, NUMBERS = 9, 3, 5
KINDS = row_kinds(("attention", "experts"), (0, 0))
ATOMS = ((0,), (1,))


def values(seed: int = 0) -> np.ndarray:
    """[atoms, steps, samples, numbers]: what each atom's output makes of the latent at each step."""
    return np.random.default_rng(seed).normal(size=(2, STEPS, SAMPLES, NUMBERS)).cumsum(axis=1)


def drift_of(y: np.ndarray, lookback: int = STEPS) -> Drift:
    """Of a model whose output is the plain sum of its regions: the displacement of (a, s) is y_a - y_s."""
    pairs = pairs_of(STEPS, lookback)
    parts = np.stack([y[:, a] - y[:, s] for a, s in pairs], axis=1).astype(np.float32)
    return Drift(STEPS, {pair: n for n, pair in enumerate(pairs)}, ATOMS, parts)


def by_hand(y: np.ndarray, plan: Plan) -> float:
    moved = np.zeros((SAMPLES, NUMBERS))
    seen: list[tuple[int, ...]] = [(), ()]
    for step, letter in enumerate(plan.letters):
        for atom in range(2):
            if KINDS[letter][atom]:
                seen[atom] = (step, *seen[atom])
            else:
                weights = PREDICTORS[plan.predictor].weights(step, seen[atom][:3])
                moved += sum(weight * y[atom, at] for at, weight in weights) - y[atom, step]
    return float(-10 * np.log10(np.square(moved).sum(axis=1)).mean())


@pytest.mark.parametrize("predictor", ["order-0", "order-1", "order-2"])
@pytest.mark.parametrize("letters", ["CFCFFCFFF", "CAFCXFAFF", "CCFAFACFX"])
def test_it_is_the_sum_of_displacements(letters: str, predictor: str) -> None:
    plan, y = Plan(letters, predictor), values()
    assert drift_of(y).quality(plan, KINDS) == pytest.approx(by_hand(y, plan), abs=1e-3)


def test_computing_everything_is_best_and_unmeasured_is_worst() -> None:
    drift = drift_of(values(), lookback=3)
    assert drift.lookback == 3
    assert drift.quality(Plan("C" * STEPS), KINDS) == pytest.approx(140)
    assert drift.quality(Plan("CFFFCCCCC", "order-0"), KINDS) > -math.inf
    assert drift.quality(Plan("CFFFFCCCC", "order-0"), KINDS) == -math.inf


def test_the_dynamic_program_gets_norms_of_forecasts() -> None:
    y = values(1)
    errors = drift_of(y).errors("order-1", max_gap=4)
    off = y[:, 3] + (y[:, 3] - y[:, 1]) / 2 * 2 - y[:, 5]
    assert errors[1, 3, 5] == pytest.approx(np.linalg.norm(off.sum(axis=0)), rel=1e-4)
    chain = best_refreshes(errors, STEPS, 4, max_gap=4)
    assert chain is not None
    assert len(chain) == 4


def test_groups_measured_for_less_long_are_taken_to_grow_as_the_whole_does() -> None:
    """Outputs on straight lines: then that is exact."""
    speed = np.random.default_rng(3).normal(size=(2, 1, SAMPLES, NUMBERS))
    y = speed * np.arange(STEPS).reshape(1, STEPS, 1, 1)
    found, true = extended(drift_of(y, lookback=2), drift_of(y)), drift_of(y)
    assert found.pairs == true.pairs
    np.testing.assert_allclose(found.parts, true.parts, rtol=1e-4)
    plan = Plan("CAFFXFFFA", "order-0")
    assert drift_of(y, lookback=2).quality(plan, KINDS) == -math.inf
    assert found.quality(plan, KINDS) == pytest.approx(true.quality(plan, KINDS), abs=1e-3)


def test_a_bound_takes_what_was_not_measured_for_the_oldest_that_was() -> None:
    y = values(2)
    short, plan = drift_of(y, lookback=3), Plan("CFFFFFCCC", "order-0")
    assert short.quality(plan, KINDS) == -math.inf
    oldest = sum(y[:, max(0, s - 3)] - y[:, s] for s in range(1, 6)).sum(axis=0)
    by_hand = float(-10 * np.log10(np.square(oldest).sum(axis=1)).mean())
    assert short.quality(plan, KINDS, clamp=True) == pytest.approx(by_hand, abs=1e-3)
    known = Plan("CFFFCFFCF", "order-0")
    assert short.quality(known, KINDS, clamp=True) == short.quality(known, KINDS)
