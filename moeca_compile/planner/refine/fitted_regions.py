"""Fitted weights for the forecasts of regions, if rollouts find them better than the polynomial's.

They come from the displacements that the search measured anyway (`search/weights.py`), so they cost rollouts alone. The
computed steps are those that the search found for polynomials, or others, placed by the estimate for fitted weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256

from moeca_compile.errors import MoecaWarning
from moeca_compile.planner.refine.better import BETTER_DB, BetterSchedule, with_costs
from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import FULL, NONE, Plan, schedule_of
from moeca_compile.planner.search.search import RACE_SEEDS
from moeca_compile.planner.search.weights import fitted_forecasts, placed_for_weights
from moeca_compile.planner.store import FITTED
from moeca_compile.planner.study import Study
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.fitted import FittedWeights
from moeca_compile.schedule.forecast import MAX_KEPT


def with_fitted_weights(study: Study, plan: Plan, quality: float, raced: Iterable[Plan] = ()) -> BetterSchedule | None:
    """Roll out fitted weights: at the plan's steps, and at steps that are placed for them.

    Args:
        study: of whole regions; it has measured their drift.
        plan: what it found.
        quality: of the plan on all seeds, dB.
        raced: the plans that the search rolled out.

    Returns:
        The result; without `ways` if it isn't better. None: there can be no weights: the plan caches nothing, two
        transformers take turns, samples are compared with given ones, or the steps' drift wasn't measured.
    """
    if not plan.caches or study.costs.full_steps or study.target.is_given:
        return None
    budget = study.request.budget
    # other orders may keep more, which an order that was asked for rules out, too
    is_limited = budget.state_bytes is not None or budget.latency is not None or len(study.request.predictors) == 1
    most = PREDICTORS[plan.predictor].terms if is_limited else MAX_KEPT
    plans = dict.fromkeys((plan, *_placed(study, plan, raced, most)))
    candidates = [one for one in (_fitted(study, each, most) for each in plans) if one is not None]
    if not candidates:
        return None
    few = min(RACE_SEEDS, len(study.request.seeds))
    best = max(candidates, key=lambda one: one.quality(study, few))
    reached = best.quality(study, len(study.request.seeds))
    tried = {f"{plan.predictor}, {FITTED}": reached}
    keys = study.sampled.program.regions.keys
    if reached <= quality + BETTER_DB:
        return BetterSchedule(schedule_of(plan, keys, study.sampled.kinds), (), quality, tried)
    return with_costs(study, BetterSchedule(best.schedule, (FITTED,), reached, tried, kept_as=best.kept_as))


@dataclass(frozen=True)
class _Candidate:
    """A schedule with fitted weights, and the plan by which its rollouts are kept."""

    schedule: Schedule
    kept_as: Plan

    def quality(self, study: Study, seeds: int) -> float:
        """Mean PSNR in dB on the first seeds."""
        study.report_progress(f"{FITTED}: rollouts on {seeds} seeds", 0.96)
        runs = (study.rollout(self.kept_as, seed, self.schedule) for seed in study.request.seeds[:seeds])
        with warnings.catch_warnings():
            # a sampler may be one that can't use the weights. Then rollouts find them no better
            warnings.simplefilter("ignore", MoecaWarning)
            return mean_psnr(runs, study.data_range)


def _fitted(study: Study, plan: Plan, most: int) -> _Candidate | None:
    """A plan with weights; None: some of its drift wasn't measured, or one output alone has nothing to weigh."""
    drift = study.split if plan.partial else study.drift
    assert drift is not None
    kinds = study.sampled.kinds
    found = fitted_forecasts(drift, plan, kinds, most)
    if found is None:
        return None
    # a plan of order 0 reuses; weighed values are forecast
    forecasting = plan if PREDICTORS[plan.predictor].order else replace(plan, predictor="order-1")
    schedule = schedule_of(forecasting, study.sampled.program.regions.keys, kinds)
    # as it is returned: weights are used by the timesteps of a call
    schedule = replace(schedule, fitted=FittedWeights(found.weights), timesteps=study.timesteps)
    mark = sha256(schedule.to_json().encode()).hexdigest()[:8]
    return _Candidate(schedule, replace(plan, predictor=f"{plan.predictor}, {FITTED} {mark}"))


def _placed(study: Study, plan: Plan, raced: Iterable[Plan], most: int) -> list[Plan]:
    """Plans of whole rows that cost no more: the first step and evenly from the second to the last one, and with the
    steps where fitted weights are expected to be best."""
    costs, steps, predictor = study.costs, len(plan.letters), plan.predictor
    most_cost = costs.fraction(plan) if study.request.budget.psnr_db is not None else 1.0

    def allowed(one: Plan) -> bool:
        return costs.allows(one, study.request.budget) and costs.fraction(one) <= most_cost + 1e-9

    counts = (n for n in range(steps, 0, -1) if allowed(Plan(FULL * n + NONE * (steps - n), predictor)))
    rest = next(counts, 1) - 1
    evenly = {0, *(1 + round(number * (steps - 2) / max(1, rest - 1)) for number in range(rest))}
    even = Plan("".join(FULL if step in evenly else NONE for step in range(steps)), predictor)
    starts = [even, *(Plan(one.letters, predictor) for one in (plan, *raced) if not one.partial)]
    starts = [one for one in starts if allowed(one)]
    if not starts:
        return []
    placed = placed_for_weights(study.drift, starts, study.sampled.kinds, allowed, min(3, most))
    return [*starts[:1], placed]
