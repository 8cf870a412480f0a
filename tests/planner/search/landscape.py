"""A made-up landscape to search: drift from wandering numbers, rollouts that are near its estimates."""

from __future__ import annotations

import random

import numpy as np

from moeca_compile.planner.search.cost import Costs
from moeca_compile.planner.search.drift import Drift, pairs_of
from moeca_compile.planner.search.predict import ORDERS, PREDICTORS
from moeca_compile.planner.search.race import Race
from moeca_compile.planner.search.rows import Plan, row_kinds
from moeca_compile.planner.search.search import Search

STEPS, SEEDS = 16, 4
KINDS = row_kinds(("attention", "experts"), (0, 0))
COSTS = Costs(
    {"C": 100.0, "A": 20.0, "F": 2.0, "X": 80.0},
    {"C": 10.0, "A": 4.0, "F": 1.0, "X": 8.0},
    {name: 1000 * predictor.terms for name, predictor in PREDICTORS.items()},
)


def drift_of(seed: int, moving: bool = False) -> Drift:
    """Outputs that wander, faster at some steps than at others; moving: one half of them in each half of the steps."""
    dice = np.random.default_rng(seed)
    speed = dice.uniform(0.1, 3.0, size=(1, STEPS, 1, 1)) ** 2
    if moving:
        early = (np.arange(STEPS) < STEPS // 2).reshape(1, STEPS, 1, 1)
        speed = np.concatenate([np.where(early, 1.0, 1e-3), np.where(early, 1e-3, 1.0)])
    y = (dice.normal(size=(2, STEPS, 4, 6)) * speed).cumsum(axis=1)
    pairs = pairs_of(STEPS, STEPS)
    parts = np.stack([y[:, a] - y[:, s] for a, s in pairs], axis=1).astype(np.float32)
    return Drift(STEPS, {pair: n for n, pair in enumerate(pairs)}, ((0,), (1,)), parts)


def search(seed: int, effort: float = 30.0, letters: str = "CF", seeds: int = SEEDS, moving: bool = False) -> Search:
    """What rolling out gives is near the estimate, but not the same."""
    drift = drift_of(seed, moving)

    def rollout(plan: Plan, at: int) -> list[float]:
        noise = random.Random(f"{plan} {at} {seed}").gauss(0, 0.7)
        return [10 ** (-(drift.quality(plan, KINDS) + noise) / 10)]

    race = Race(range(seeds), rollout, lambda plan: COSTS.fraction(plan) + 0.06, data_range=1.0)
    return Search(STEPS, KINDS, COSTS, drift, race, ORDERS, letters=letters, split=drift, effort=effort, moves=40)
