"""Predictors that schedules can't run: each has its line in the report, at the winner's cost, for a few rollouts."""

from __future__ import annotations

import pytest

from moeca_compile.planner.request import Request
from moeca_compile.planner.search.budget import Budget
from moeca_compile.planner.search.cheapest import cheapest
from moeca_compile.planner.search.others import SAMPLED, try_others
from moeca_compile.planner.search.predict import OTHERS, Predictor
from moeca_compile.planner.search.rows import Plan
from moeca_compile.planner.search.search import NEAR_DB, Search
from tests.planner.search.landscape import COSTS, SEEDS, search

NAMES = {one.name for one in OTHERS}


def sampled_of(one: Search) -> dict[Plan, int]:
    return {plan: one.race.count(plan) for plan in one.race.seen if plan.predictor in NAMES}


@pytest.mark.parametrize("seed", range(3))
def test_each_is_told_and_only_what_could_win_is_sampled(seed: int) -> None:
    one, budget = search(seed), Budget(macs=0.34)
    best = one.best(budget)
    lead = max(map(one.estimate, one.race.seen))
    try_others(one, OTHERS, best, budget)
    for name in NAMES:
        assert (name in one.found) != (f"{name}, by estimate" in one.found)
    sampled = sampled_of(one)
    assert {plan.predictor for plan in sampled} == NAMES & one.found.keys()
    for plan, seeds in sampled.items():
        assert one.estimate(plan) >= lead - NEAR_DB
        assert seeds <= SAMPLED
        assert COSTS.fraction(plan) <= COSTS.fraction(best)
        assert one.found[plan.predictor] == one.race.quality(plan, seeds)


def test_one_that_falls_behind_on_the_first_seed_is_left() -> None:
    """Rollouts of the others come out ten times as far off as estimated."""
    one, budget = search(1), Budget(macs=0.5)
    best, rollout = one.best(budget), one.race.rollout
    one.race.rollout = lambda plan, seed: [10 * error for error in rollout(plan, seed)]
    one.estimate = lambda plan: 99.0 if plan.predictor in NAMES else 0.0  # type: ignore[method-assign]
    try_others(one, OTHERS, best, budget)
    assert set(sampled_of(one).values()) == {1}


def test_what_is_far_behind_by_estimate_is_not_sampled() -> None:
    one, budget = search(1), Budget(macs=0.5)
    best, estimate = one.best(budget), one.estimate
    spent = one.race.spent
    one.estimate = lambda plan: estimate(plan) - 20 * (plan.predictor in NAMES)  # type: ignore[method-assign]
    try_others(one, OTHERS, best, budget)
    assert one.race.spent == spent
    assert {f"{name}, by estimate" for name in NAMES} <= one.found.keys()
    assert all(one.found[f"{name}, by estimate"] < one.race.quality(best, SEEDS) for name in NAMES)


def test_a_quality_budget_compares_at_the_cost_that_was_found() -> None:
    one, budget = search(1, effort=60), Budget(psnr_db=-20.0)
    best, proposed = cheapest(one, budget), one.proposed
    asked: list[Budget] = []

    def noted(predictor: Predictor, cost: Budget) -> Plan | None:
        asked.append(cost)
        return proposed(predictor, cost)

    one.proposed = noted  # type: ignore[method-assign]
    try_others(one, OTHERS, best, budget)
    assert asked == [Budget(macs=COSTS.fraction(best))] * len(OTHERS)


def test_nothing_is_tried_where_nothing_is_cached_or_kept() -> None:
    one = search(0)
    try_others(one, OTHERS, one.best(Budget(macs=1.0)), Budget(macs=1.0))
    tight = Budget(macs=0.5, state_bytes=1000)  # of one output: the others keep two or three
    try_others(one, OTHERS, one.best(tight), tight)
    assert not any(name.startswith(tuple(NAMES)) for name in one.found)


def test_they_are_tried_where_the_order_is_free() -> None:
    def others(order: int | str) -> object:
        return Request.read("macs:0.5", order, 4, (0,), 0, None, None, 1, None, 0, 0.0).others

    assert others("auto") == OTHERS
    assert others(1) == ()
