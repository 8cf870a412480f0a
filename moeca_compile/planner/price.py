"""What a calibration may cost, told before anything is sampled: in uncached trajectories, by parts.

Each part is a bound that follows from the request, but for two: what a step costs beside its computed regions is taken
to be `OVERHEAD`, and in the search's last round every uniform plan that could still be better is rolled out, for which
`LAST` plans on all seeds are allowed. Fewer computed steps than the budget allows cost less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeca_compile.frontend.prompts import takes
from moeca_compile.planner.drift.stale import PRICE
from moeca_compile.planner.output.derivatives import DIRECTIONS
from moeca_compile.planner.output.fit import RESPONSES
from moeca_compile.planner.output.paths import FINER
from moeca_compile.planner.output.rule import CHECKED, EFFORT, PLANS
from moeca_compile.planner.output.together import AGAIN, DAMPING, ROUNDS, SHARE
from moeca_compile.planner.refine.thin import WAYS
from moeca_compile.planner.request import Request
from moeca_compile.planner.rollout import TIMESTEPS
from moeca_compile.planner.search.challengers import PROBES
from moeca_compile.planner.search.cheapest import SEARCHES
from moeca_compile.planner.search.search import RACE_PLANS, RACE_SEEDS
from moeca_compile.planner.study import GAPS, LOOKBACK, OVERHEAD, SEEDS_PER_MEASURED, SPLIT_LOOKBACK
from moeca_compile.planner.truth import Goal
from moeca_compile.schedule.granularity import OUTPUT
from moeca_compile.schedule.output import CONVERGED, UNCACHED

LAST = 3  # plans that the search's last round is taken to roll out on all seeds
ATOMS = 4  # groups of regions that partial rows take apart


@dataclass(frozen=True)
class Price:
    """A bound of what a calibration costs; it prints as one line.

    Attributes:
        parts: uncached trajectories by what they are for, in order.
        seeds, holdout: how many there are.
    """

    parts: dict[str, float]
    seeds: int
    holdout: int

    @property
    def total(self) -> float:
        """In uncached trajectories, a whole number: the parts are told so."""
        return float(sum(map(math.ceil, self.parts.values())))

    def line(self, what: str, is_resumed: bool) -> str:
        """For people.

        Args:
            what: name of the public function.
            is_resumed: a folder may hold some of it.
        """
        held_out = f" and {self.holdout} held-out ones" if self.holdout else ""
        parts = ", ".join(f"{math.ceil(cost)} {name}" for name, cost in self.parts.items())
        known = ", less what the folder has" if is_resumed else ""
        return (
            f"{what}: up to {self.total:.0f} uncached trajectories of {self.seeds} seeds{held_out}{known}: {parts}; "
            "more only where many uniform schedules come so near to the best one that the search goes on, or where a "
            f"step takes more than {OVERHEAD:.0%} of the time beside its regions"
        )


def price_of(requests: Sequence[Request], granularity: str, goal: Goal, sample: Callable[..., Any]) -> Price:
    """What the searches for some budgets may cost together.

    Args:
        requests: one a budget, of the same seeds.
        granularity: as for `calibrate`.
        goal: its `truth`, as `goal_of` gives it.
        sample: the caller's loop.
    """
    first = requests[0]
    seeds, holdout = len(first.seeds), len(first.holdout)
    every, measured = seeds + holdout, min(seeds, max(2, seeds // SEEDS_PER_MEASURED))
    parts = {"to sample": every + 1.0}  # the first seed twice
    if granularity == OUTPUT:
        parts["to record some of them again"] = min(seeds, measured + 1.0)
    else:
        # as `Study._drift`: of the first budget
        lookback = max(LOOKBACK, GAPS / min(first.budget.macs or 1.0, first.budget.latency or 1.0))
        parts["to measure"] = OVERHEAD * (measured * lookback + SPLIT_LOOKBACK * ATOMS * (first.max_variants > 2))
    if goal == CONVERGED:
        parts["for the converged truth"] = sum(FINER) * every + holdout
    elif goal != UNCACHED:
        parts["for the given truth"] = every
    parts["for the search"] = sum(map(_search, requests))
    parts["of its last round"] = sum(LAST * seeds * _rollout(request) * _searches(request) for request in requests)
    if granularity == OUTPUT:
        times = goal == CONVERGED and takes(sample, TIMESTEPS)
        parts["to choose steps and terms of the weights"] = sum(_weights(request, times) for request in requests)
        parts[f"to fit them together, in up to {ROUNDS} rounds as long as each gains {AGAIN:g} dB"] = sum(
            map(_together, requests)
        ) * (2 if times else 1)
    else:
        # at the steps that were found, and at two other placements
        tried = 2 * min(RACE_SEEDS, seeds) + seeds
        parts["to try fitted weights"] = sum(tried * _rollout(request) for request in requests)
    if first.perturb:
        parts["for stale experts"] = PRICE * first.perturb
    if first.branches:
        parts["for schedules with branches"] = sum(map(_branches, requests))
    if granularity == "auto":
        parts["for the stack"] = 1 + sum(seeds * _rollout(request) for request in requests)
    # held-out seeds, and with weights, or with the state handed over, all of them again
    parts["to check the result"] = sum((every + holdout) * _rollout(request) for request in requests)
    return Price(parts, seeds, holdout)


def _share(request: Request) -> float:
    """The most that a plan computes. A budget of another kind doesn't say, so that it's 1."""
    return min(1.0, request.budget.macs or 1.0)


def _rollout(request: Request) -> float:
    return _share(request) + OVERHEAD


def _searches(request: Request) -> int:
    return SEARCHES if request.budget.psnr_db is not None else 1


def _search(request: Request) -> float:
    """Rollouts within `effort`, or the least that a search makes: probes, and a race of plans that halves."""
    seeds = len(request.seeds)
    probes = max(PROBES, len(request.predictors))
    least = probes + RACE_PLANS + 2 * (min(2 * RACE_SEEDS, seeds) - 1) + max(0, seeds - 2 * RACE_SEEDS)
    return max(request.effort, _searches(request) * least * _rollout(request))


def _weights(request: Request, times: bool) -> float:
    """Rollouts on the seeds that weights aren't fitted to; `times`: timesteps are searched, by uncached runs."""
    seeds, rollout = len(request.seeds), _rollout(request)
    checking = seeds // CHECKED or seeds
    tried = len(RESPONSES) + (3 if times else 2) * PLANS
    moved = max(EFFORT, checking * _share(request)) * rollout / _share(request)
    return tried * checking * rollout + moved + (PLANS + 1 if times else 0)


def _together(request: Request) -> float:
    """Derivatives on as many seeds as `effort` pays for, and rollouts that check the weights of each round."""
    seeds, rollout = len(request.seeds), _rollout(request)
    derivatives = min(SHARE * request.effort, seeds * (2 + DIRECTIONS) * rollout)
    return ROUNDS * (derivatives + len(DAMPING) * min(seeds * rollout, derivatives / 4))


def _branches(request: Request) -> float:
    """A second search, and thinning."""
    seeds, rollout = len(request.seeds), _rollout(request)
    thinned = (WAYS * min(RACE_SEEDS, seeds) + 2 * seeds) * rollout
    return 1 + _search(request) + LAST * seeds * rollout * _searches(request) + thinned
