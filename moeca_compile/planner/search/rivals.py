"""Uniform plans that could still beat a winner, and the rollouts that settle it.

There are far more uniform plans than can be rolled out, but each has an estimate, and how far estimates are off is seen
on the uniform plans that are rolled out: relative to the winner, a plan is better than its estimate says by some mean
and scatter. A plan that would have to beat that mean by more than `SURE` standard deviations is out. Of those that
aren't, the most dangerous one is rolled out on another seed, until none is left: out now is who is behind the winner by
more than `SURE` standard errors of the paired differences, those of sampling from the finitely many seeds. Who gets to
the last seed and is ahead there becomes the winner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.race import Race
from moeca_compile.planner.search.rows import Plan

SURE = 3.0  # standard deviations
LEAST_DB = 0.5  # no scatter, of estimates or seeds, is taken to be less: few rollouts can agree by chance
PROBES = 5  # that the scatter of the estimates is read from, at least
APART = 8  # probes differ in one of so many steps, at least: neighbours err alike


@dataclass
class Rivals:
    """The uniform plans within a budget; `estimate` gives decibels up to a constant, the winner's on the same scale."""

    race: Race
    uniform: Sequence[Plan]
    estimate: Callable[[Plan], float]

    def probe(self, first: Sequence[Plan] = ()) -> None:
        """Roll out on one seed: these, and the likeliest by estimate that differ enough to err differently."""
        chosen = list(first)
        for plan in sorted(self.uniform, key=lambda plan: -self.estimate(plan)):
            if len(chosen) >= PROBES:
                break
            if all(APART * _differing(plan, other) >= len(plan.letters) for other in chosen):
                chosen.append(plan)
        for plan in chosen:
            self.race.run(plan, 1)

    def left(self, best: Plan) -> list[Plan]:
        """Those that could be better than `best`, the most dangerous first."""
        mean, scatter = self._errors(best)
        noise = self._noise(best)
        threat = {plan: self._threat(plan, best, mean + SURE * scatter, noise) for plan in self.uniform if plan != best}
        return sorted((plan for plan, ahead in threat.items() if ahead > 0), key=lambda plan: -threat[plan])

    def settle(self, best: Plan) -> Plan:
        """`best`, or the uniform plan that is better than it on all seeds."""
        everyone = len(self.race.seeds)
        self.race.run(best, everyone)
        while left := self.left(best):
            plan = left[0]
            if self.race.count(plan) == everyone:
                best = plan
            else:
                self.race.run(plan, self.race.count(plan) + 1)
        return best

    def _threat(self, plan: Plan, best: Plan, reach: float, noise: float) -> float:
        """By how many decibels the plan might be ahead on all seeds."""
        seen, everyone = self._common(plan, best), len(self.race.seeds)
        if not seen:
            return self.estimate(plan) - self.estimate(best) + reach
        ahead = self.race.quality(plan, seen) - self.race.quality(best, seen)
        return ahead + SURE * noise * math.sqrt((1 / seen) * (1 - seen / everyone))

    def _errors(self, best: Plan) -> tuple[float, float]:
        """Of the estimates: mean and scatter of how much better than estimated plans are, relative to `best`."""
        off = []
        for plan in self.uniform:
            if plan != best and (seen := self._common(plan, best)):
                ahead = self.race.quality(plan, seen) - self.race.quality(best, seen)
                off.append(ahead - (self.estimate(plan) - self.estimate(best)))
        if not off:
            return 0.0, math.inf
        return fmean(off), max(LEAST_DB, stdev(off) if len(off) > 1 else math.inf)

    def _noise(self, best: Plan) -> float:
        """Scatter over the seeds of how far plans are ahead of `best`."""
        squares, free = 0.0, 0
        for plan in self.uniform:
            seen = self._common(plan, best)
            if plan != best and seen > 1:
                ahead = [self._on(plan, seed) - self._on(best, seed) for seed in self.race.seeds[:seen]]
                squares += (seen - 1) * stdev(ahead) ** 2
                free += seen - 1
        return max(LEAST_DB, math.sqrt(squares / free)) if free else 2 * LEAST_DB

    def _on(self, plan: Plan, seed: int) -> float:
        return mean_psnr([self.race.seen[plan][seed]], self.race.data_range)

    def _common(self, plan: Plan, best: Plan) -> int:
        return min(self.race.count(plan), self.race.count(best))


def _differing(one: Plan, other: Plan) -> int:
    return sum(a != b for a, b in zip(one.letters, other.letters, strict=True))
