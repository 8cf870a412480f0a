"""What predictors that schedules can't run would have given: a line each in the report, so that none is left untried.

Each gets the plan that is best for it by estimate, at the winner's cost. Where that estimate is near or above those of
the plans that can be run, the plan is sampled too: one seed, and a second one if it holds its own on the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeca_compile.planner.search.budget import Budget
from moeca_compile.planner.search.predict import Predictor
from moeca_compile.planner.search.rows import Plan
from moeca_compile.planner.search.search import NEAR_DB, Search

SAMPLED = 2  # seeds, at most: it is a report, nothing hangs on it


def try_others(search: Search, others: Sequence[Predictor], best: Plan, budget: Budget) -> None:
    """Add them to `search.found`; `best`: what the search gave for `budget`."""
    if not best.caches:
        return
    race = search.race
    cost = replace(budget, psnr_db=None, macs=search.costs.fraction(best))
    lead = max(map(search.estimate, race.seen))
    ruler = race.quality(best, len(race.seeds)) - search.optimistic(best)
    for predictor in others:
        plan = search.proposed(predictor, cost)
        if plan is None:
            continue
        estimate = search.estimate(plan)
        if estimate < lead - NEAR_DB:
            search.keep(plan, ruler + estimate, ", by estimate")
            continue
        seeds, quality = 1, race.run(plan, 1)
        while quality >= race.quality(best, seeds) - NEAR_DB and seeds < min(SAMPLED, len(race.seeds)):
            seeds += 1
            quality = race.run(plan, seeds)
        search.keep(plan, quality)
