"""The search on a made-up landscape: within budget, never worse than a uniform plan it rolled out, frugal."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moeca_compile.errors import ScheduleError
from moeca_compile.plan.budget import Budget
from moeca_compile.plan.cheapest import cheapest
from moeca_compile.plan.cost import Costs
from moeca_compile.plan.drift import Drift, pairs_of
from moeca_compile.plan.predict import ORDERS
from moeca_compile.plan.race import Race
from moeca_compile.plan.rows import Plan, row_kinds, uniform_letters
from moeca_compile.plan.search import Search

STEPS, SEEDS = 16, 4
KINDS = row_kinds(("attention", "experts"), (0, 0))
COSTS = Costs(
    {"C": 100.0, "A": 20.0, "F": 2.0, "X": 80.0},
    {"C": 10.0, "A": 4.0, "F": 1.0, "X": 8.0},
    {f"order-{n}": 1000 * (n + 1) for n in range(3)},
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.2, 0.34, 0.5, 0.7])
def test_it_keeps_its_budget_and_no_uniform_plan_at_all_is_better(seed: int, share: float) -> None:
    """All of them are rolled out here, after the search, which can't afford it."""
    one = search(seed)
    plan = one.best(Budget(macs=share))
    assert COSTS.fraction(plan) <= share
    spent = one.race.spent
    assert spent <= 30 + 2 * SEEDS * (share + 0.06)
    uniform = one._uniform(Budget(macs=share))
    assert one.race.quality(plan, SEEDS) >= max(one.race.run(other, SEEDS) for other in uniform)
    assert one.race.spent > 2 * spent, "far from all had been rolled out"


def test_all_uniform_plans_are_candidates() -> None:
    one = search(0)
    found = set(one._uniform(Budget(macs=0.5)))
    every = {
        Plan(uniform_letters(STEPS, interval, warmup), f"order-{order}")
        for interval in range(1, STEPS + 1)
        for warmup in range(1, STEPS)
        for order in range(3)
    }
    assert found == {plan for plan in every if COSTS.fraction(plan) <= 0.5}


def test_what_did_not_win_is_reported() -> None:
    one = search(1)
    one.best(Budget(macs=0.34))
    assert {"order-0", "order-1", "order-2"} <= {name.removesuffix(", by estimate") for name in one.found}
    assert {f"uniform order-{order}" for order in range(3)} <= set(one.found)


def test_partial_rows_are_used_where_they_pay() -> None:
    """Experts that stand still, attention that moves: rows of attention only are nearly as good as full ones."""
    one = search(0, letters="CFA")
    one.drift.parts[1] *= 0.01
    one.drift.__post_init__()
    plan = one.best(Budget(macs=0.3))
    assert "A" in plan.letters


def test_kinds_of_partial_row_are_mixed_only_while_there_are_variants() -> None:
    """Either half of the regions moves at half of the steps: rows that compute the right half pay."""
    for variants in (2, 3, 4):
        one = search(3, letters="CFAX", moving=True)
        one.variants = variants
        plan = one.best(Budget(macs=0.5))
        assert len(plan.partial) == variants - 2, plan


def test_partial_rows_that_did_not_win_are_reported() -> None:
    one = search(1, letters="CFAX")
    plan = one.best(Budget(macs=0.34))
    told = {name.removesuffix(", by estimate") for name in one.found if " with " in name}
    assert any(name.endswith(" with A") for name in told)
    assert not plan.partial or any("".join(f" with {x}" for x in sorted(plan.partial)) in name for name in told)


def test_a_budget_for_everything_computes_everything() -> None:
    assert search(0).best(Budget(macs=1.0)).letters == "C" * STEPS


def test_state_decides_what_order_fits() -> None:
    assert search(2).best(Budget(macs=0.5, state_bytes=1000)).predictor == "order-0"
    with pytest.raises(ScheduleError, match=r"nearest that can is .* state:1000 bytes"):
        search(2).best(Budget(macs=0.5, state_bytes=999))


def test_latency_is_a_budget_of_its_own() -> None:
    plan = search(2).best(Budget(latency=0.5))
    assert COSTS.fraction(plan, "ms") <= 0.5


def test_a_budget_below_the_cheapest_plan_says_the_nearest() -> None:
    with pytest.raises(ScheduleError, match=r"nearest that can is macs:0\.081"):
        search(0).best(Budget(macs=0.01))


def test_a_quality_budget_gives_the_cheapest_that_holds_it() -> None:
    one = search(1, effort=60)
    middle = one.race.run(one.best(Budget(macs=0.4)), SEEDS)
    other = search(1, effort=60)
    plan = cheapest(other, Budget(psnr_db=middle - 0.5))
    assert other.race.quality(plan, SEEDS) >= middle - 0.5
    assert COSTS.fraction(plan) <= 0.45
    easier = search(1, effort=60)
    assert COSTS.fraction(cheapest(easier, Budget(psnr_db=middle - 12))) < COSTS.fraction(plan)


def test_a_quality_that_the_other_limits_forbid_says_how_near_it_comes() -> None:
    with pytest.raises(ScheduleError, match=r"reaches -?\d+\.\d dB"):
        cheapest(search(1), Budget(macs=0.2, psnr_db=90))
    assert cheapest(search(1), Budget(psnr_db=140)).letters == "C" * STEPS


def test_the_same_search_twice_finds_the_same() -> None:
    assert search(0).best(Budget(macs=0.34)) == search(0).best(Budget(macs=0.34))
