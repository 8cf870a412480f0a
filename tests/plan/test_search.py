"""The search on a made-up landscape: within budget, never worse than a uniform plan, frugal with rollouts."""

from __future__ import annotations

import random

import pytest

from moeca_compile.errors import ScheduleError
from moeca_compile.plan.budget import Budget
from moeca_compile.plan.cost import Costs, row_of, schedule_of
from moeca_compile.plan.search import Search
from moeca_compile.schedule import Action

STEPS = 20
COSTS = Costs({"C": 100.0, "A": 20.0, "F": 2.0}, {"C": 10.0, "A": 4.0, "F": 1.0}, state_bytes=1000)


def landscape(plan: str, seed: int) -> float:
    """Forecast steps cost their distance, weighted by a hidden importance of each step; attention rows help half."""
    dice = random.Random(seed)
    weight = [dice.uniform(0.1, 3.0) ** 2 for _ in plan]
    total, since = 0.0, 0.0
    for letter, w in zip(plan, weight, strict=True):
        since = 0.0 if letter == "C" else since * 0.5 if letter == "A" else since + 1
        total += w * since**2
    return total


def search(seed: int, rollouts: int = 60, **options: object) -> Search:
    rolled: list[str] = []

    def rollout(plan: str) -> float:
        assert plan not in rolled, "a plan is rolled out once"
        rolled.append(plan)
        return landscape(plan, seed)

    found = Search(STEPS, COSTS, {}, rollout, rollouts, **options)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.2, 0.34, 0.5])
def test_it_is_no_worse_than_any_uniform_plan_it_rolled_out(seed: int, share: float) -> None:
    one = search(seed)
    plan = one.best(Budget(macs=share))
    assert COSTS.fraction(plan) <= share
    uniform = [
        "".join("C" if s < warmup or (s - warmup + 1) % n == 0 else "F" for s in range(STEPS))
        for n in range(1, 17)
        for warmup in (1, 2, 3, 4)
    ]
    allowed = [u for u in uniform if COSTS.fraction(u) <= share]
    assert landscape(plan, seed) <= min(landscape(u, seed) for u in allowed if u in one.seen)
    assert len(one.seen) <= 60 + len(allowed)


def test_a_budget_for_everything_computes_everything() -> None:
    assert search(0).best(Budget(macs=1.0)) == "C" * STEPS


def test_without_attention_rows_there_are_two_variants() -> None:
    plan = search(1, with_attention=False).best(Budget(macs=0.3))
    assert set(plan) == {"C", "F"}


def test_state_that_does_not_fit_means_no_cache() -> None:
    assert search(2).best(Budget(macs=1.0, state_bytes=999)) == "C" * STEPS


def test_latency_is_a_budget_of_its_own() -> None:
    plan = search(3).best(Budget(latency=0.5))
    assert COSTS.fraction(plan, "ms") <= 0.5


def test_a_budget_below_the_cheapest_plan_says_the_nearest() -> None:
    with pytest.raises(ScheduleError, match="the cheapest plan there is takes"):
        search(0).best(Budget(macs=0.01))


def test_row_kinds() -> None:
    kinds = ("attention", "experts", "mlp")
    assert row_of("A", kinds, 1) == (Action.COMPUTE, Action.FORECAST, Action.FORECAST)
    assert row_of("F", kinds, 0) == (Action.REUSE,) * 3
    assert schedule_of("CC", ("a", "b", "c"), kinds, 1).depth(0) == 0
    assert schedule_of("CAF", ("a", "b", "c"), kinds, 2).rows[1] == row_of("A", kinds, 2)
