"""Fitted weights for the forecasts of regions, if rollouts find them better than the polynomial's.

They come from the displacements that the search measured anyway (`search/weights.py`), so they cost rollouts alone: one
a seed. The computed steps stay those that the search found for polynomials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256

from moeca_compile.planner.refine.better import BETTER_DB, BetterSchedule, with_costs
from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import Plan, schedule_of
from moeca_compile.planner.search.weights import fitted_forecasts
from moeca_compile.planner.study import Study
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.fitted import FittedWeights
from moeca_compile.schedule.forecast import MAX_KEPT

NAME = "fitted weights"


def with_fitted_weights(study: Study, plan: Plan, quality: float) -> BetterSchedule | None:
    """Roll out the plan's steps with fitted weights.

    Args:
        study: of whole regions; it has measured their drift.
        plan: what it found.
        quality: of the plan on all seeds, dB.

    Returns:
        The result; without `ways` if it isn't better. None: the weights aren't expected to be better, or there can be
        none: the plan caches nothing, two transformers take turns, or samples are compared with given ones.
    """
    if not plan.caches or study.costs.full_steps or study.target.is_given:
        return None
    drift = study.split if plan.partial else study.drift
    assert drift is not None
    budget, own = study.request.budget, PREDICTORS[plan.predictor].terms
    is_limited = budget.state_bytes is not None or budget.latency is not None
    found = fitted_forecasts(drift, plan, study.sampled.kinds, own if is_limited else MAX_KEPT)
    if found is None or found.quality <= found.polynomial:
        return None
    keys, kinds = study.sampled.program.regions.keys, study.sampled.kinds
    # a plan of order 0 reuses; weighed values are forecast
    forecasting = schedule_of(plan if own > 1 else replace(plan, predictor="order-1"), keys, kinds)
    schedule = replace(forecasting, fitted=FittedWeights(found.weights))
    mark = sha256(schedule.to_json().encode()).hexdigest()[:8]
    kept_as = replace(plan, predictor=f"{plan.predictor}, {NAME} {mark}")
    reached = mean_psnr(_errors(study, kept_as, schedule), study.data_range)
    tried = {f"{plan.predictor}, {NAME}": reached}
    if reached <= quality + BETTER_DB:
        return BetterSchedule(schedule_of(plan, keys, kinds), (), quality, tried)
    return with_costs(study, BetterSchedule(schedule, (NAME,), reached, tried, kept_as=kept_as))


def _errors(study: Study, kept_as: Plan, schedule: Schedule) -> Iterator[Sequence[float]]:
    """Of the samples of each seed."""
    for number, seed in enumerate(study.request.seeds, start=1):
        study.report_progress(f"{NAME}: rollout {number}", 0.96)
        yield study.rollout(kept_as, seed, schedule)
