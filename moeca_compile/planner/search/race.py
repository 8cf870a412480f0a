"""Which plan is rolled out on which seeds: many plans on few seeds, few plans on all (successive halving).

Source: Jamieson & Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS 2016.
Comparisons are paired: two plans are compared on seeds that both have run on, so a hard seed affects both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import Plan

Rollout = Callable[[Plan, int], Sequence[float]]  # plan, seed -> mean squared error of each sample


@dataclass
class Race:
    """All rollouts so far, and their cost.

    Attributes:
        seeds: in the order in which plans run on them.
        rollout: samples one seed with a plan; called once per pair.
        price: of one rollout of a plan, in uncached trajectories.
        data_range: of the samples, for the PSNR.
        progress: called after each rollout with the plan, its quality in dB so far, and its number of seeds.
        spent: the cost so far, in uncached trajectories.
        errors: of each plan, by seed, the mean squared error of each sample.
    """

    seeds: Sequence[int]
    rollout: Rollout
    price: Callable[[Plan], float]
    data_range: float
    progress: Callable[[Plan, float, int], None] = lambda plan, quality, seeds: None
    spent: float = 0.0
    errors: dict[Plan, dict[int, Sequence[float]]] = field(default_factory=dict)

    def run(self, plan: Plan, seeds: int) -> float:
        """Roll the plan out on the first `seeds` seeds, except where it has run already; its quality there, in dB."""
        done = self.errors.setdefault(plan, {})
        for seed in self.seeds[:seeds]:
            if seed not in done:
                done[seed] = self.rollout(plan, seed)
                self.spent += self.price(plan)
                self.progress(plan, mean_psnr(done.values(), self.data_range), len(done))
        return self.quality(plan, seeds)

    def quality(self, plan: Plan, seeds: int) -> float:
        """Mean PSNR in dB on the first `seeds` seeds; the plan must have run on them."""
        return mean_psnr((self.errors[plan][seed] for seed in self.seeds[:seeds]), self.data_range)

    def count(self, plan: Plan) -> int:
        """On how many of the seeds, in order, the plan has run."""
        return len(self.errors.get(plan, {}))

    def halve(self, plans: Sequence[Plan], first: int, last: int, keep: int) -> list[Plan]:
        """The `keep` best plans, best first: all run on `first` seeds, then the better half on twice as many, up to
        `last` seeds."""
        remaining, seeds = list(dict.fromkeys(plans)), min(first, len(self.seeds))
        while True:
            for plan in remaining:
                self.run(plan, seeds)
            remaining.sort(key=lambda plan: -self.quality(plan, seeds))
            if seeds >= min(last, len(self.seeds)):
                return remaining[:keep]
            remaining = remaining[: max(keep, (len(remaining) + 1) // 2)]
            seeds = min(2 * seeds, last, len(self.seeds))
