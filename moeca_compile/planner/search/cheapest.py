"""The other way round: a quality that must be held, and the cheapest plan that holds it."""

from __future__ import annotations

import math
from dataclasses import replace

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.search.budget import Budget
from moeca_compile.planner.search.drift import full_plan
from moeca_compile.planner.search.rows import Plan
from moeca_compile.planner.search.search import Search


def cheapest(search: Search, budget: Budget) -> Plan:
    """The cheapest plan that holds `budget.psnr_db` on every seed's mean: bisection over the share of the MACs.

    Raises:
        ScheduleError: within the budget's other limits no plan holds it; says how near the best comes.
    """
    assert budget.psnr_db is not None
    wanted, most = budget.psnr_db, budget.macs or 1.0
    low, high = 0.0, most
    holds: list[Plan] = []
    missed: list[float] = []
    told: dict[Plan, dict[str, float]] = {}  # what was tried beside a plan, at its cost
    whole, everyone = search.effort, len(search.race.seeds)
    fraction = min(most, 0.34)
    for _ in range(5):
        search.effort, search.found = search.race.spent + whole / 5, {}
        try:
            plan = search.best(replace(budget, macs=fraction, psnr_db=None))
            quality = search.race.quality(plan, everyone)
            told[plan] = search.found
        except ScheduleError:  # nothing is that cheap
            if fraction == most:
                raise
            plan, quality = None, -math.inf
        if plan is not None and quality >= wanted:
            holds.append(plan)
            high = min(high, search.costs.fraction(plan))
        else:
            missed.append(quality)
            low = fraction
        if fraction == most and not holds:
            break
        fraction = (low + high) / 2 if holds else most if fraction > 0.6 * most else min(most, 1.6 * fraction)
    every = [p for p in search.race.seen if search.race.count(p) == everyone]
    holds += [p for p in every if search.race.quality(p, everyone) >= wanted and search.costs.allows(p, budget)]
    if not holds and search.costs.allows(full_plan(search.steps), budget):
        search.race.run(full_plan(search.steps), everyone)
        holds.append(full_plan(search.steps))
    if not holds:
        raise ScheduleError(
            f"psnr:{wanted:g} can't be held within the other limits of the budget: the best plan found there reaches "
            f"{max(missed):.1f} dB"
        )
    best = min(holds, key=search.costs.fraction)
    search.found = told.get(best, {})
    return best
