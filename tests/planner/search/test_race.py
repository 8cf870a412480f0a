"""The race: nothing twice, few on all seeds, the best survives."""

from __future__ import annotations

import math

import pytest

from moeca_compile.planner.search.quality import CEILING_DB, mean_psnr, psnr
from moeca_compile.planner.search.race import Race
from moeca_compile.planner.search.rows import Plan

PLANS = [Plan("C" + "F" * n) for n in range(1, 9)]


def race() -> tuple[Race, list[tuple[Plan, int]]]:
    rolled: list[tuple[Plan, int]] = []

    def rollout(plan: Plan, seed: int) -> list[float]:
        assert (plan, seed) not in rolled, "a rollout is made once"
        rolled.append((plan, seed))
        return [1e-3 * len(plan.letters) * (1 + seed), 1e-4]

    return Race(range(8), rollout, lambda plan: 0.5, data_range=1.0), rolled


def test_few_plans_reach_the_last_seeds() -> None:
    one, rolled = race()
    best = one.halve(PLANS, 1, 8, 2)
    assert best == PLANS[:2]
    assert len(rolled) == 8 * 1 + 4 * 1 + 2 * 2 + 2 * 4
    assert one.spent == pytest.approx(0.5 * len(rolled))
    assert [one.count(plan) for plan in PLANS] == [8, 8, 2, 2, 1, 1, 1, 1]


def test_progress_is_told_of_each() -> None:
    one, _ = race()
    told: list[int] = []
    one.progress = lambda plan, quality, seeds: told.append(seeds)
    one.run(PLANS[0], 3)
    one.run(PLANS[0], 3)
    assert told == [1, 2, 3]


def test_quality_is_the_mean_of_decibels() -> None:
    assert psnr(0.01, 1.0) == pytest.approx(20)
    assert psnr(0.01, 2.0) == pytest.approx(20 + 20 * math.log10(2))
    assert psnr(0.0, 1.0) == CEILING_DB
    assert mean_psnr([(0.01, 0.001), (0.1, 0.01)], 1.0) == pytest.approx((20 + 30 + 10 + 20) / 4)
