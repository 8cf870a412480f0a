"""Find the best plan within a budget: propose by estimate, decide by rollouts.

Annealed plans are raced, more of them on few seeds than on many, and the best one is improved by local search with
rollouts while the effort lasts. What is returned has been sampled with every seed; and against every uniform plan that
the budget allows, with every predictor, it was settled that none is better on those seeds (`planner/search/rivals.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.search.anneal import anneal, neighbours, polish, put
from moeca_compile.planner.search.budget import Budget
from moeca_compile.planner.search.cost import Costs
from moeca_compile.planner.search.drift import Drift, cheapest_plan, full_plan
from moeca_compile.planner.search.predict import Predictor
from moeca_compile.planner.search.race import Race
from moeca_compile.planner.search.refresh import best_refreshes, plan_of
from moeca_compile.planner.search.rivals import Rivals
from moeca_compile.planner.search.rows import FULL, NONE, Kinds, Plan, uniform_letters

NEAR_DB = 0.5  # a plan so near the best on few seeds goes on to more
HOPELESS_DB = 6.0  # behind the best estimate: not raced
RACED = 4  # seeds that candidates are compared on before the last round
HOPEFUL = 4  # planned ones that are raced
FEW = 5  # moves a step of an annealing that mostly goes into the report
MIXED = 1  # of them with partial rows, at most


@dataclass
class Search:
    """One search over plans of `steps` letters.

    Attributes:
        kinds: the row kinds of the graph; `letters`: those that plans may use; `variants`: at most so many in one plan.
        split: a drift whose atoms tell partial rows apart; None: no partial rows.
        effort: what the rollouts may cost together, in uncached trajectories; the last round is made in any case.
        found: the best plan of each family that was looked at, and its quality in dB on the seeds it has seen; where
            it was not rolled out, by estimate.
    """

    steps: int
    kinds: Kinds
    costs: Costs
    drift: Drift
    race: Race
    predictors: Sequence[Predictor]
    letters: str = FULL + NONE
    split: Drift | None = None
    variants: int = 4
    effort: float = 32.0
    moves: int = 40  # of one annealing, a step
    found: dict[str, float] = field(default_factory=dict)
    _estimates: dict[Plan, float] = field(default_factory=dict, repr=False)
    _shift: dict[str, float] = field(default_factory=dict, repr=False)

    def best(self, budget: Budget) -> Plan:
        """The plan of best quality that the budget allows.

        Raises:
            ScheduleError: not even the cheapest plan keeps within it.
        """
        if self.costs.allows(full_plan(self.steps), budget):
            plan = full_plan(self.steps)
            self.race.run(plan, len(self.race.seeds))
            return plan
        planned = self._planned(budget)
        if not planned:
            raise ScheduleError(self.too_tight(budget))
        uniform = self._uniform(budget)
        raced = min(RACED, len(self.race.seeds))
        rivals = Rivals(self.race, uniform, self.optimistic)
        rivals.probe(self._of_each_predictor(uniform))
        winners = self.race.halve(self._hopeful(planned), 1, raced, 2)
        winners = self._improve(winners, budget, raced, rivals)
        plan = rivals.settle(self._finish(winners, raced))
        self._note(set(uniform), planned)
        return plan

    def _finish(self, winners: Sequence[Plan], raced: int) -> Plan:
        """The better one of the first two on twice as many seeds, if they are near each other."""
        lead = self.race.quality(winners[0], raced)
        near = [plan for plan in winners[:2] if self.race.quality(plan, raced) >= lead - NEAR_DB]
        return max(near, key=lambda plan: self.race.run(plan, min(2 * raced, len(self.race.seeds))))

    # -- candidates -------------------------------------------------------------------------------------------------

    def _uniform(self, budget: Budget) -> list[Plan]:
        """Every uniform plan within the budget, the most promising by estimate first."""
        letters = dict.fromkeys(
            uniform_letters(self.steps, interval, warmup)
            for interval in range(1, self.steps + 1)
            for warmup in range(1, self.steps)
        )
        plans = [Plan(one, predictor.name) for one in letters for predictor in self.predictors]
        return [plan for plan in plans if self.costs.allows(plan, budget)]

    def _of_each_predictor(self, plans: Sequence[Plan]) -> list[Plan]:
        best: dict[str, Plan] = {}
        for plan in sorted(plans, key=lambda plan: -self.estimate(plan)):
            best.setdefault(plan.predictor, plan)
        return list(best.values())

    def _hopeful(self, planned: Sequence[Plan]) -> list[Plan]:
        """The best by estimate, few of them with partial rows: their estimates err more."""
        near = [plan for plan in planned if self.estimate(plan) >= self.estimate(planned[0]) - HOPELESS_DB]
        mixed = [plan for plan in near if plan.partial][:MIXED]
        whole = [plan for plan in near if not plan.partial]
        return [*whole[: HOPEFUL - len(mixed)], *mixed]

    def _planned(self, budget: Budget) -> list[Plan]:
        """Annealed plans, the best by estimate first: of each predictor, all rows in step; then with partial rows."""
        plans: list[Plan] = []
        first = [one for predictor in self.predictors if (one := self.proposed(predictor, budget)) is not None]
        lead = max(map(self.estimate, first), default=0.0)
        for one in first:
            if self.estimate(one) < lead - HOPELESS_DB:
                plans.append(one)  # for the report
                continue
            other = self._anneal(one, FULL + NONE, budget, heat=2.0, seed=1)
            best = max(one, other, key=self.estimate)
            for seed in range(2, 4):
                best = self._anneal(best, FULL + NONE, budget, heat=0.5, seed=seed)
            plans += dict.fromkeys([one, other, best])  # estimates err by a decibel: the race decides among them
            if self.split is not None:
                plans += self._mixed(best, self.split, budget)
        plans.sort(key=lambda plan: -self.estimate(plan))
        return plans

    def proposed(self, predictor: Predictor, budget: Budget) -> Plan | None:
        """The best by estimate, all rows in step; None: the budget allows nothing."""
        start = self._start(predictor, budget)
        return None if start is None else self._anneal(start, FULL + NONE, budget, heat=2.0, seed=0)

    def _mixed(self, whole: Plan, split: Drift, budget: Budget) -> list[Plan]:
        """The best with partial rows by estimate: of each kind alone, and of several together."""
        self._shift[whole.predictor] = self.estimate(whole) - split.quality(whole, self.kinds)
        partial = self.letters.replace(FULL, "").replace(NONE, "")
        found = []
        for letter in partial:
            swapped = [put(whole.letters, at, letter) for at, old in enumerate(whole.letters) if at and old == FULL]
            starts = [Plan(one, whole.predictor) for one in swapped]
            if starts:
                start = max(starts, key=self.estimate)
                found.append(self._anneal(start, FULL + NONE + letter, budget, heat=0.5, seed=4, moves=FEW, mixed=True))
        if len(found) > 1 and self.variants > 3:
            best = max(found, key=self.estimate)
            found.append(self._anneal(best, FULL + NONE + partial, budget, heat=0.5, seed=5, mixed=True))
        return list(dict.fromkeys(found))

    def _anneal(
        self, start: Plan, letters: str, budget: Budget, heat: float, seed: int, moves: int = 0, mixed: bool = False
    ) -> Plan:
        """moves: of a step, default `self.moves`; mixed: only plans with a partial row."""
        inside, many = self._inside(budget), (moves or self.moves) * self.steps

        def allowed(plan: Plan) -> bool:
            return (bool(plan.partial) or not mixed) and inside(plan)

        found = anneal(start, letters, self.estimate, allowed, moves=many, heat=heat, seed=seed)
        return polish(found, self.estimate, allowed)

    def _start(self, predictor: Predictor, budget: Budget) -> Plan | None:
        """All rows in step: the dynamic programme's plan, or an even one where gaps are wider than was measured."""
        name, inside = predictor.name, self._inside(budget)
        counts = range(1, self.steps + 1)
        count = max((n for n in counts if inside(Plan(FULL * n + NONE * (self.steps - n), name))), default=0)
        if not count:
            return None
        even = tuple(round(n * self.steps / count) for n in range(count))
        gap = max(2, self.drift.lookback // 2)
        errors = self.drift.errors(name, gap)
        chain = best_refreshes(errors, self.steps, count, gap) if count > 1 else None
        starts = [Plan(plan_of(one, self.steps), name) for one in (even, chain) if one is not None]
        return max(starts, key=self.estimate)

    def _improve(self, winners: list[Plan], budget: Budget, raced: int, rivals: Rivals) -> list[Plan]:
        """Local search by rollouts: the likeliest neighbours of the best plan, while the effort lasts."""
        inside = self._inside(budget)
        tried: set[Plan] = set(self.race.seen)
        while True:
            best = winners[0]
            price = self.race.price(best)
            later = len(self.race.seeds) + raced + 2 * len(rivals.left(best))  # rollouts that come after this
            if self.race.spent + (later + raced) * price > self.effort:
                return winners
            near = [plan for plan in neighbours(best, self._letters_of(best)) if plan not in tried and inside(plan)]
            if not near:
                return winners
            plan = max(near, key=self.estimate)
            tried.add(plan)
            if self.race.run(plan, 1) < self.race.quality(best, 1) - NEAR_DB:
                continue
            self.race.run(plan, raced)
            winners = sorted([*winners, plan], key=lambda one: -self.race.quality(one, raced))[:3]

    def _letters_of(self, plan: Plan) -> str:
        return "".join(sorted({FULL, NONE, *plan.partial}))

    # -- small helpers ----------------------------------------------------------------------------------------------

    def _inside(self, budget: Budget) -> Callable[[Plan], bool]:
        return lambda plan: len(plan.partial) <= self.variants - 2 and self.costs.allows(plan, budget)

    def estimate(self, plan: Plan) -> float:
        """Decibels up to a constant; of partial rows by their own drift, set to agree on the best plan without them."""
        if plan not in self._estimates:
            if plan.partial and self.split is not None:
                found = self.split.quality(plan, self.kinds) + self._shift[plan.predictor]
            else:
                found = self.drift.quality(plan, self.kinds)
            self._estimates[plan] = found
        return self._estimates[plan]

    def optimistic(self, plan: Plan) -> float:
        """The estimate, or where it isn't known one that is too good."""
        known = self.estimate(plan)
        return known if known > -math.inf else self.drift.quality(plan, self.kinds, beyond=True)

    def _note(self, uniform: Collection[Plan], planned: Sequence[Plan]) -> None:
        """Keep the best of each family for the report: what won, and what did not."""
        for plan in self.race.seen:
            before = "uniform " if plan in uniform else ""
            self.keep(plan, self.race.quality(plan, self.race.count(plan)), before=before)
        ruler = max(self.race.seen, key=lambda plan: (self.race.count(plan), plan.letters))
        known = self.race.quality(ruler, self.race.count(ruler)) - self.optimistic(ruler)
        for plan in planned:
            if plan not in self.race.seen and self.estimate(plan) > -math.inf:
                self.keep(plan, known + self.estimate(plan), ", by estimate")

    def keep(self, plan: Plan, quality: float, after: str = "", before: str = "") -> None:
        """Add to `found`."""
        kinds = "".join(f" with {letter}" for letter in sorted(plan.partial))
        name = f"{before}{plan.predictor}{kinds}{after}"
        self.found[name] = max(self.found.get(name, -math.inf), quality)

    def too_tight(self, budget: Budget) -> str:
        """Why nothing is allowed, and the nearest that is."""
        least = [cheapest_plan(self.steps, predictor.name) for predictor in self.predictors]
        cheap = min(least, key=lambda plan: (self.costs.fraction(plan), self.costs.state_of(plan)))
        small = min(self.costs.state_of(plan) for plan in least)
        latency = f", latency:{self.costs.fraction(cheap, 'ms'):.3f}" if self.costs.ms else ""
        return (
            f"budget {budget} can't be kept: the nearest that can is macs:{self.costs.fraction(cheap):.3f}{latency} "
            f"with state:{small} bytes (one computed step, all others forecast)"
        )
