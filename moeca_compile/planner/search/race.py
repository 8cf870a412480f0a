"""Who is rolled out on which seeds: many plans on few seeds, few plans on all (successive halving).

Comparisons are paired: two plans are judged on seeds that both have seen, so that a hard seed hurts both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import Plan

Rollout = Callable[[Plan, int], Sequence[float]]  # plan, seed -> of each sample the mean squared error


@dataclass
class Race:
    """Every rollout made, and what they cost.

    Attributes:
        rollout: samples one seed with a plan; called once a pair.
        price: of one rollout of a plan, in uncached trajectories.
        spent: so far, in the same unit.
        progress: told of each rollout: the plan, its quality in dB on the seeds seen, how many these are.
    """

    seeds: Sequence[int]
    rollout: Rollout
    price: Callable[[Plan], float]
    data_range: float
    progress: Callable[[Plan, float, int], None] = lambda plan, quality, seeds: None
    spent: float = 0.0
    seen: dict[Plan, dict[int, Sequence[float]]] = field(default_factory=dict)

    def run(self, plan: Plan, seeds: int) -> float:
        """Roll the plan out on the first so many seeds, unless it has been; its quality there, in dB."""
        done = self.seen.setdefault(plan, {})
        for seed in self.seeds[:seeds]:
            if seed not in done:
                done[seed] = self.rollout(plan, seed)
                self.spent += self.price(plan)
                self.progress(plan, mean_psnr(done.values(), self.data_range), len(done))
        return self.quality(plan, seeds)

    def quality(self, plan: Plan, seeds: int) -> float:
        """Mean PSNR in dB on the first so many seeds, all of which the plan has seen."""
        return mean_psnr((self.seen[plan][seed] for seed in self.seeds[:seeds]), self.data_range)

    def count(self, plan: Plan) -> int:
        """How many of the seeds, in order, the plan has seen."""
        return len(self.seen.get(plan, {}))

    def halve(self, plans: Sequence[Plan], first: int, last: int, keep: int) -> list[Plan]:
        """The `keep` best: all on `first` seeds, then the better half on twice as many, up to `last`; best first."""
        left, seeds = list(dict.fromkeys(plans)), min(first, len(self.seeds))
        while True:
            for plan in left:
                self.run(plan, seeds)
            left.sort(key=lambda plan: -self.quality(plan, seeds))
            if seeds >= min(last, len(self.seeds)):
                return left[:keep]
            left = left[: max(keep, (len(left) + 1) // 2)]
            seeds = min(2 * seeds, last, len(self.seeds))
