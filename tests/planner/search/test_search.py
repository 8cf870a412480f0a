"""The search on a made-up landscape: within budget, never worse than a uniform plan it rolled out, frugal."""

from __future__ import annotations

import pytest

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.search.cheapest import cheapest
from moeca_compile.planner.search.drift import Drift
from moeca_compile.planner.search.rows import Plan, uniform_letters
from moeca_compile.schedule.budget import Budget
from tests.planner.search.landscape import COSTS, SEEDS, STEPS, search


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
    assert {"order-0", "order-1", "order-2"} <= {name.removesuffix(", by estimate") for name in one.family_quality}
    assert {f"uniform order-{order}" for order in range(3)} <= set(one.family_quality)


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
    told = {name.removesuffix(", by estimate") for name in one.family_quality if " with " in name}
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
    reached = {name: quality for name, quality in other.family_quality.items() if "estimate" not in name}
    assert reached["uniform order-1"] < middle, "what is told was tried at that cost, not at others"
    easier = search(1, effort=60)
    assert COSTS.fraction(cheapest(easier, Budget(psnr_db=middle - 12))) < COSTS.fraction(plan)


def test_a_quality_that_the_other_limits_forbid_says_how_near_it_comes() -> None:
    with pytest.raises(ScheduleError, match=r"reaches -?\d+\.\d dB"):
        cheapest(search(1), Budget(macs=0.2, psnr_db=90))
    assert cheapest(search(1), Budget(psnr_db=140)).letters == "C" * STEPS


def test_the_same_search_twice_finds_the_same() -> None:
    assert search(0).best(Budget(macs=0.34)) == search(0).best(Budget(macs=0.34))


def test_partial_rows_that_look_too_good_leave_out_no_plan_without() -> None:
    found = search(0, letters="CFA")
    assert found.split is not None
    parts = found.split.parts.copy()
    parts[1] *= 1e-4  # as if attention were all that drifts: rows that compute it seem exact
    found.split = Drift(found.split.steps, found.split.pairs, found.split.atoms, parts)
    found.best(Budget(macs=0.4))
    uniform = {plan.letters for plan in found._uniform(Budget(macs=0.4))}
    raced = {plan.letters for plan in found.race.errors}
    assert any("A" in letters for letters in raced)
    assert any("A" not in letters and letters not in uniform for letters in raced)
