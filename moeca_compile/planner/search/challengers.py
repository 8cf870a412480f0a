"""Uniform plans that could still beat the incumbent, and the rollouts that decide.

There are far more uniform plans than can be rolled out. Each has an estimate, and the rollouts of some of them show the
errors of the estimates: relative to the incumbent, a plan is better than its estimate by a mean error with a standard
deviation. A plan is discarded if its estimate plus the mean error plus `SIGMAS` standard deviations is below the
incumbent. The others are rolled out one seed at a time, the most promising plan first, until each one trails the
incumbent by more than `SIGMAS` standard errors of the paired differences, or has run on every seed. There are finitely
many seeds, so the standard error has the finite population correction (Cochran, Sampling Techniques, 2.6). A plan that
is ahead on all seeds is the new incumbent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.race import Race
from moeca_compile.planner.search.rows import Plan

SIGMAS = 3.0
LEAST_DB = 0.5  # lower bound of every standard deviation: a few rollouts can agree by chance
PROBES = 5  # plans that the error of the estimates is computed from, at least
MIN_DISTANCE = 8  # probes differ in at least one of so many steps: the estimates of similar plans have similar errors


@dataclass
class Challengers:
    """The uniform plans within a budget.

    Attributes:
        race: makes the rollouts.
        uniform: the plans.
        estimate: the estimated quality of a plan, dB up to a constant; the incumbent's is on the same scale.
    """

    race: Race
    uniform: Sequence[Plan]
    estimate: Callable[[Plan], float]

    def probe(self, first: Sequence[Plan] = ()) -> None:
        """Roll out on one seed the plans `first`, and the best by estimate that differ enough from each other."""
        probes = list(first)
        for plan in sorted(self.uniform, key=lambda plan: -self.estimate(plan)):
            if len(probes) >= PROBES:
                break
            if all(MIN_DISTANCE * _distance(plan, other) >= len(plan.letters) for other in probes):
                probes.append(plan)
        for plan in probes:
            self.race.run(plan, 1)

    def remaining(self, incumbent: Plan) -> list[Plan]:
        """The plans that could be better than `incumbent`, the most promising one first."""
        mean, deviation = self._estimate_errors(incumbent)
        noise = self._noise(incumbent)
        leads: dict[Plan, float] = {}
        for plan in self.uniform:
            if plan != incumbent:
                lead = self._greatest_lead(plan, incumbent, mean + SIGMAS * deviation, noise)
                if lead > 0:
                    leads[plan] = lead
        return sorted(leads, key=lambda plan: -leads[plan])

    def winner(self, incumbent: Plan) -> Plan:
        """`incumbent`, or the uniform plan that is better on all seeds."""
        all_seeds = len(self.race.seeds)
        self.race.run(incumbent, all_seeds)
        while challengers := self.remaining(incumbent):
            plan = challengers[0]
            if self.race.count(plan) == all_seeds:
                incumbent = plan
            else:
                self.race.run(plan, self.race.count(plan) + 1)
        return incumbent

    def _greatest_lead(self, plan: Plan, incumbent: Plan, error: float, noise: float) -> float:
        """The upper bound, in dB, of how far the plan is ahead of the incumbent on all seeds.

        error: the upper bound of the estimate's error, in dB; noise: see `_noise`.
        """
        shared, all_seeds = self._shared_seeds(plan, incumbent), len(self.race.seeds)
        if not shared:
            return self.estimate(plan) - self.estimate(incumbent) + error
        lead = self.race.quality(plan, shared) - self.race.quality(incumbent, shared)
        return lead + SIGMAS * noise * math.sqrt((1 / shared) * (1 - shared / all_seeds))

    def _estimate_errors(self, incumbent: Plan) -> tuple[float, float]:
        """Mean and standard deviation, in dB, of how much better than estimated plans are, relative to `incumbent`."""
        errors = []
        for plan in self.uniform:
            if plan != incumbent and (shared := self._shared_seeds(plan, incumbent)):
                lead = self.race.quality(plan, shared) - self.race.quality(incumbent, shared)
                errors.append(lead - (self.estimate(plan) - self.estimate(incumbent)))
        if not errors:
            return 0.0, math.inf
        return fmean(errors), max(LEAST_DB, stdev(errors) if len(errors) > 1 else math.inf)

    def _noise(self, incumbent: Plan) -> float:
        """Standard deviation over the seeds, in dB, of how far plans are ahead of `incumbent`; pooled over plans."""
        squares, freedom = 0.0, 0
        for plan in self.uniform:
            shared = self._shared_seeds(plan, incumbent)
            if plan != incumbent and shared > 1:
                leads = [self._psnr(plan, seed) - self._psnr(incumbent, seed) for seed in self.race.seeds[:shared]]
                squares += (shared - 1) * stdev(leads) ** 2
                freedom += shared - 1
        return max(LEAST_DB, math.sqrt(squares / freedom)) if freedom else 2 * LEAST_DB

    def _psnr(self, plan: Plan, seed: int) -> float:
        return mean_psnr([self.race.errors[plan][seed]], self.race.data_range)

    def _shared_seeds(self, plan: Plan, other: Plan) -> int:
        return min(self.race.count(plan), self.race.count(other))


def _distance(plan: Plan, other: Plan) -> int:
    """How many steps have different letters."""
    return sum(a != b for a, b in zip(plan.letters, other.letters, strict=True))
