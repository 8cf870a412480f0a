"""Annealing finds the optimum of small landscapes, keeps within what is allowed, and moves are all there."""

from __future__ import annotations

import itertools

import pytest

from moeca_compile.planner.search.anneal import anneal, neighbors, polish
from moeca_compile.planner.search.rows import Plan

STEPS = 9


def quality(plan: Plan) -> float:
    """Steps differ in weight; a forecast costs its distance from the last computed row."""
    weights = (1, 5, 1, 1, 7, 1, 1, 1, 6)
    last, total = 0, 0
    for step, letter in enumerate(plan.letters):
        last = step if letter == "C" else last
        total += weights[step] * (step - last) ** 2
    return -float(total)


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_best_of_all_plans(seed: int) -> None:
    every = ["C" + "".join(rest) for rest in itertools.product("CF", repeat=STEPS - 1)]
    best = max(quality(Plan(one)) for one in every if one.count("C") <= 4)
    found = anneal(Plan("CCCCFFFFF"), "CF", quality, lambda plan: plan.letters.count("C") <= 4, moves=1500, seed=seed)
    assert found.letters.count("C") <= 4
    assert found.letters[0] == "C"
    assert quality(found) == best


def test_it_keeps_the_predictor_and_returns_the_start_if_nothing_else_is_allowed() -> None:
    start = Plan("CFFFFFFFF", "order-2")
    assert anneal(start, "CF", quality, lambda plan: plan == start, moves=50) == start


def test_polishing_spends_what_is_left() -> None:
    plan = polish(Plan("CFFFFFFFF"), quality, lambda plan: plan.letters.count("C") <= 3)
    assert plan.letters.count("C") == 3
    assert quality(plan) > quality(Plan("CCCFFFFFF"))
    assert polish(plan, quality, lambda plan: plan.letters.count("C") <= 3) == plan


def test_neighbors_are_one_move_away() -> None:
    found = {plan.letters for plan in neighbors(Plan("CFFCF"), "CFA")}
    assert {"CFCFF", "CFFFC", "CCFFF", "CAFCF", "CFFAF", "CFFFF"} <= found
    assert "CFFCF" not in found
    assert all(one[0] == "C" for one in found)
