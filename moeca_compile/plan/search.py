"""Find the best plan within a budget: starts (uniform ones, the dynamic programme's), then local search by rollouts.

Every plan that is considered for the answer has been rolled out: sampled with the calibration seeds and compared with
the uncached samples. A quarter of the rollouts goes to the dearest uniform plans that the budget allows: on those seeds
the answer is never worse than any of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from moeca_compile.errors import ScheduleError
from moeca_compile.plan.budget import Budget
from moeca_compile.plan.cost import Costs
from moeca_compile.plan.refresh import Errors, best_refreshes, plan_of

Rollout = Callable[[str], float]  # plan -> mean squared error of its samples against the uncached ones


@dataclass
class Search:
    """One search. `seen` holds every plan that was rolled out and its error; `progress` is told of each.

    Attributes:
        rollouts: how many plans may be rolled out.
        with_attention: whether attention-only rows may be used (a third variant).
    """

    steps: int
    costs: Costs
    errors: Errors
    rollout: Rollout
    rollouts: int
    with_attention: bool = True
    max_gap: int = 8
    progress: Callable[[str, float], None] = lambda plan, error: None
    seen: dict[str, float] = field(default_factory=dict)

    def best(self, budget: Budget) -> str:
        """The plan of least error that the budget allows.

        Raises:
            ScheduleError: not even the cheapest plan keeps within it.
        """
        starts = self._starts(budget)
        if not starts:
            raise ScheduleError(self._too_tight(budget))
        for plan in starts:
            self._error(plan)
        current = min((p for p in self.seen if self.costs.allows(p, budget)), key=self.seen.__getitem__)
        dice = random.Random(0)
        moved = True
        while moved and len(self.seen) < self.rollouts:
            moved = False
            neighbours = [p for p in dict.fromkeys(self._neighbours(current, budget)) if p not in self.seen]
            dice.shuffle(neighbours)
            for plan in neighbours[: max(0, self.rollouts - len(self.seen))]:
                if self._error(plan) < self.seen[current]:
                    current, moved = plan, True
                    break
        return current

    def _error(self, plan: str) -> float:
        if plan not in self.seen:
            self.seen[plan] = self.rollout(plan)
            self.progress(plan, self.seen[plan])
        return self.seen[plan]

    # -- starts -----------------------------------------------------------------------------------------------------

    def _starts(self, budget: Budget) -> list[str]:
        """Allowed plans worth a rollout, the dearest of each family: cheaper ones of a family are not better."""
        return list(dict.fromkeys([*self._family(self._uniform(), budget), *self._planned(budget)]))

    def _family(self, plans: Iterator[str], budget: Budget) -> list[str]:
        allowed = [plan for plan in plans if self.costs.allows(plan, budget)]
        return sorted(allowed, key=self.costs.fraction, reverse=True)[: max(4, self.rollouts // 4)]

    def _uniform(self) -> Iterator[str]:
        for interval in range(1, min(self.steps, 2 * self.max_gap) + 1):
            for warmup in (1, 2, 3, 4):
                letters = ["C" if s < warmup or (s - warmup + 1) % interval == 0 else "F" for s in range(self.steps)]
                yield "".join(letters)
                if self.with_attention and interval >= 4 and interval % 2 == 0:
                    half = interval // 2
                    yield "".join(
                        "A" if mark == "F" and s >= warmup and (s - warmup + 1) % half == 0 else mark
                        for s, mark in enumerate(letters)
                    )

    def _planned(self, budget: Budget) -> Iterator[str]:
        """The dynamic programme's plan with as many refreshes as fit, and with fewer and attention rows instead."""
        most = max((n for n in range(1, self.steps + 1) if self._fits(n, budget)), default=0)
        for count in sorted({most, most - 1, most - 2}, reverse=True):
            chain = best_refreshes(self.errors, self.steps, count, self.max_gap) if count > 1 else None
            if chain is not None:
                plan = plan_of(chain, self.steps)
                yield plan
                yield self._fill(plan, budget)

    def _fits(self, count: int, budget: Budget) -> bool:
        return self.costs.allows("C" * count + "F" * (self.steps - count), budget)

    def _too_tight(self, budget: Budget) -> str:
        least = min(self._uniform(), key=self.costs.fraction)
        latency = f", {self.costs.fraction(least, 'ms'):.1%} of the latency" if self.costs.ms else ""
        return (
            f"{budget} can't be kept: the cheapest plan there is takes {self.costs.fraction(least):.1%} of the MACs"
            f"{latency} and {self.costs.state_bytes} bytes of state"
        )

    # -- moves ------------------------------------------------------------------------------------------------------

    def _neighbours(self, plan: str, budget: Budget) -> Iterator[str]:
        """Plans one move away that the budget allows, with what is left of it spent on attention rows."""
        for moved in self._moves(plan):
            if self.costs.allows(moved, budget):
                yield moved
                yield self._fill(moved, budget)

    def _moves(self, plan: str) -> Iterator[str]:
        for at, letter in enumerate(plan):
            if at == 0:
                continue
            if letter != "F":
                for to in (at - 2, at - 1, at + 1, at + 2):  # a refresh a little earlier or later
                    if 0 < to < self.steps and plan[to] != letter:
                        yield _put(_put(plan, at, plan[to]), to, letter)
                yield _put(plan, at, "F")
            if letter != "C":
                yield _put(plan, at, "C")
                for other in range(1, self.steps):  # a refresh from anywhere else
                    if plan[other] == "C" and abs(other - at) > 2:
                        yield _put(_put(plan, other, "F"), at, "C")

    def _fill(self, plan: str, budget: Budget) -> str:
        """Attention rows in the middle of the widest gaps, while the budget lasts."""
        while self.with_attention:
            gaps = [(len(run), start) for start, run in _runs(plan) if len(run) >= 2]
            if not gaps:
                return plan
            length, start = max(gaps, key=lambda gap: (gap[0], -gap[1]))
            more = _put(plan, start + length // 2, "A")
            if not self.costs.allows(more, budget):
                return plan
            plan = more
        return plan


def _put(plan: str, at: int, letter: str) -> str:
    return plan[:at] + letter + plan[at + 1 :]


def _runs(plan: str) -> Iterator[tuple[int, str]]:
    """Stretches of forecast steps: (start, letters)."""
    start = None
    for at, letter in enumerate(plan + "C"):
        if letter == "F":
            start = at if start is None else start
        elif start is not None:
            yield start, plan[start:at]
            start = None


def psnr(mse: float, data_range: float) -> float:
    """Decibels of a mean squared error against a signal of this range."""
    return math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)
