"""The dynamic program against brute force over all sets of refresh steps."""

from __future__ import annotations

import itertools
import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_compile.planner.search.refresh import Errors, best_refreshes, plan_of


def random_errors(steps: int, seed: int) -> Errors:
    dice = random.Random(seed)
    pairs = itertools.combinations(range(-1, steps), 2)
    return {(p, a, s): dice.random() for p, a in pairs for s in range(a + 1, steps)}


def summed(errors: Errors, chain: tuple[int, ...], steps: int) -> float:
    total, marks = 0.0, (-1, *chain, steps)
    for p, a, b in zip(marks, marks[1:], marks[2:], strict=False):
        total += sum(errors[p, a, s] for s in range(a + 1, b))
    return total


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 8), st.integers(0, 10**6), st.data())
def test_it_finds_the_least_error_of_all_sets(steps: int, seed: int, data: st.DataObject) -> None:
    errors = random_errors(steps, seed)
    count = data.draw(st.integers(2, steps))
    found = best_refreshes(errors, steps, count, max_gap=steps)
    chains = [(0, *rest) for rest in itertools.combinations(range(1, steps), count - 1)]
    assert found is not None
    assert len(found) == count
    assert math.isclose(summed(errors, found, steps), min(summed(errors, c, steps) for c in chains), rel_tol=1e-9)


def test_a_gap_that_is_too_wide_is_no_plan() -> None:
    errors = random_errors(10, 0)
    assert best_refreshes(errors, 10, 3, max_gap=3) is None
    chain = best_refreshes(errors, 10, 4, max_gap=3)
    assert chain is not None
    assert max(b - a for a, b in itertools.pairwise((*chain, 10))) <= 3


def test_the_plan_computes_exactly_the_chain() -> None:
    assert plan_of((0, 2, 3), 6) == "CFCCFF"
