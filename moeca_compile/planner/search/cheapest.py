"""The inverse search: the cheapest plan that reaches a quality."""

from __future__ import annotations

import math
from dataclasses import replace

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.search.drift import full_plan
from moeca_compile.planner.search.rows import Plan
from moeca_compile.planner.search.search import Search
from moeca_compile.schedule.budget import Budget

SEARCHES = 5
FIRST_FRACTION = 0.34  # of the MACs


def cheapest(search: Search, budget: Budget) -> Plan:
    """The cheapest plan that reaches `budget.psnr_db`, by bisection over the fraction of the MACs.

    Args:
        search: run `SEARCHES` times with a fifth of its effort each; it is left with the `family_quality` of the plan.
        budget: with a limit on the quality (dB, mean over the samples of all seeds), and perhaps others.

    Returns:
        The plan. It has run on all seeds of the race.

    Raises:
        ScheduleError: no plan within the other limits reaches the quality. The message gives the best one reached.
    """
    assert budget.psnr_db is not None
    target, most = budget.psnr_db, budget.macs or 1.0
    low, high = 0.0, most
    reaching: list[Plan] = []
    missed: list[float] = []  # qualities below the target
    reports: dict[Plan, dict[str, float]] = {}  # the families that were tried at the cost of a plan
    effort, all_seeds = search.effort, len(search.race.seeds)
    fraction = min(most, FIRST_FRACTION)
    for _ in range(SEARCHES):
        search.effort, search.family_quality = search.race.spent + effort / SEARCHES, {}
        try:
            plan = search.best(replace(budget, macs=fraction, psnr_db=None))
            quality = search.race.quality(plan, all_seeds)
            reports[plan] = search.family_quality
        except ScheduleError:  # no plan is that cheap
            if fraction == most:
                raise
            plan, quality = None, -math.inf
        if plan is not None and quality >= target:
            reaching.append(plan)
            high = min(high, search.costs.fraction(plan))
        else:
            missed.append(quality)
            low = fraction
        if fraction == most and not reaching:
            break
        if reaching:
            fraction = (low + high) / 2
        elif fraction > 0.6 * most:
            fraction = most
        else:
            fraction = min(most, 1.6 * fraction)
    for plan in search.race.errors:
        on_all_seeds = search.race.count(plan) == all_seeds
        if on_all_seeds and search.race.quality(plan, all_seeds) >= target and search.costs.allows(plan, budget):
            reaching.append(plan)
    if not reaching and search.costs.allows(full_plan(search.steps), budget):
        plan = full_plan(search.steps)
        missed.append(search.race.run(plan, all_seeds))
        if search.floor is not None and missed[-1] < target:  # else it's the truth itself, but for rounding
            raise ScheduleError(
                f"psnr:{target:g} can't be held: computed at every step, the samples are {missed[-1]:.1f} dB from "
                f"those that truth gives, and the best plan found reaches {max(missed):.1f} dB"
            )
        reaching.append(plan)
    if not reaching:
        raise ScheduleError(
            f"psnr:{target:g} can't be held within the other limits of the budget: the best plan found there reaches "
            f"{max(missed):.1f} dB"
        )
    best = min(reaching, key=search.costs.fraction)
    search.family_quality = reports.get(best, {})
    return best
