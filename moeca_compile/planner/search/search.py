"""Find the best plan within a budget: propose plans by estimate, decide by rollouts.

The search races annealed plans, more of them on few seeds than on many, and improves the best one by local search with
rollouts while the effort lasts. The returned plan has run on every seed, and no uniform plan within the budget, with
any predictor, is better on those seeds (`planner/search/challengers.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.search.anneal import anneal, neighbors, polish, replaced
from moeca_compile.planner.search.challengers import Challengers
from moeca_compile.planner.search.cost import Costs
from moeca_compile.planner.search.drift import Drift, cheapest_plan, full_plan
from moeca_compile.planner.search.floor import Floor
from moeca_compile.planner.search.predict import Predictor
from moeca_compile.planner.search.race import Race
from moeca_compile.planner.search.refresh import best_refreshes, plan_of
from moeca_compile.planner.search.rows import FULL, NONE, Kinds, Plan, uniform_letters
from moeca_compile.schedule.budget import Budget

CLOSE_DB = 0.5  # a plan this close to the best one on few seeds runs on more seeds
HOPELESS_DB = 6.0  # a plan this far behind the best estimate is not raced
RACE_SEEDS = 4  # seeds that candidates are compared on before the last round
RACE_PLANS = 4  # annealed plans that are raced
RACE_PARTIAL = 1  # of them with partial rows, at most
PARTIAL_MOVES = 5  # annealing moves per step for one kind of partial row: the result is mostly for the report


@dataclass
class Search:
    """One search over plans of `steps` letters.

    Attributes:
        steps: of the trajectory.
        kinds: the row kinds of the graph.
        costs: of each row kind.
        drift: estimates plans without partial rows.
        race: makes the rollouts.
        predictors: that plans may use.
        letters: the row kinds that plans may use.
        split: a drift whose atoms distinguish partial rows; None: no partial rows.
        variants: distinct rows of a plan, at most.
        effort: what the rollouts together may cost, in uncached trajectories. The last round is made in any case.
        moves: of one annealing, per step.
        floor: where the rollouts are compared with given samples, how far the uncached ones are from those.
        family_quality: for each family of plans the best quality that a plan of it reached, in dB on the seeds that
            the plan has run on; if it was not rolled out, by estimate.
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
    moves: int = 40
    floor: Floor | None = None
    family_quality: dict[str, float] = field(default_factory=dict)
    _estimates: dict[Plan, float] = field(default_factory=dict, repr=False)
    _shift: dict[str, float] = field(default_factory=dict, repr=False)  # by predictor, of the estimates by `split`

    def best(self, budget: Budget) -> Plan:
        """The plan of best quality that the budget allows.

        Args:
            budget: without a limit on the quality.

        Returns:
            The plan. It has run on all seeds of the race.

        Raises:
            ScheduleError: not even the cheapest plan fits the budget.
        """
        if self.costs.allows(full_plan(self.steps), budget):
            plan = full_plan(self.steps)
            self.race.run(plan, len(self.race.seeds))
            return plan
        annealed = self._annealed(budget)
        if not annealed:
            raise ScheduleError(self._too_tight(budget))
        uniform = self._uniform(budget)
        seeds = min(RACE_SEEDS, len(self.race.seeds))
        challengers = Challengers(self.race, uniform, self._expected)
        challengers.probe(self._best_of_each_predictor(uniform))
        leaders = self.race.halve(self._promising(annealed), 1, seeds, 2)
        leaders = self._improve(leaders, budget, seeds, challengers)
        plan = challengers.winner(self._better_of_two(leaders, seeds))
        self._report(set(uniform), annealed)
        return plan

    def _better_of_two(self, leaders: Sequence[Plan], seeds: int) -> Plan:
        """The better of the first two plans; if they are close on `seeds` seeds, on twice as many."""
        top = self.race.quality(leaders[0], seeds)
        close = [plan for plan in leaders[:2] if self.race.quality(plan, seeds) >= top - CLOSE_DB]
        return max(close, key=lambda plan: self.race.run(plan, min(2 * seeds, len(self.race.seeds))))

    # -- candidates -------------------------------------------------------------------------------------------------

    def _uniform(self, budget: Budget) -> list[Plan]:
        """Every uniform plan within the budget."""
        letters = dict.fromkeys(
            uniform_letters(self.steps, interval, warmup)
            for interval in range(1, self.steps + 1)
            for warmup in range(1, self.steps)
        )
        plans = [Plan(text, predictor.name) for text in letters for predictor in self.predictors]
        return [plan for plan in plans if self.costs.allows(plan, budget)]

    def _best_of_each_predictor(self, plans: Sequence[Plan]) -> list[Plan]:
        """The best plan by estimate of each predictor."""
        best: dict[str, Plan] = {}
        for plan in sorted(plans, key=lambda plan: -self.estimate(plan)):
            best.setdefault(plan.predictor, plan)
        return list(best.values())

    def _promising(self, plans: Sequence[Plan]) -> list[Plan]:
        """The plans to race, of `plans` with the best one first. Few have partial rows: their estimates err more, so
        that they leave out none without."""
        whole = [plan for plan in plans if not plan.partial]
        close = [plan for plan in whole if self.estimate(plan) >= self.estimate(whole[0]) - HOPELESS_DB]
        partial = [plan for plan in plans if plan.partial][:RACE_PARTIAL]
        partial = [plan for plan in partial if self.estimate(plan) >= self.estimate(plans[0]) - HOPELESS_DB]
        return [*close[: RACE_PLANS - len(partial)], *partial]

    def _annealed(self, budget: Budget) -> list[Plan]:
        """Annealed plans of each predictor, without and with partial rows; the best one by estimate first."""
        plans: list[Plan] = []
        first: list[Plan] = []
        for predictor in self.predictors:
            proposed = self._proposed(predictor, budget)
            if proposed is not None:
                first.append(proposed)
        top = max(map(self.estimate, first), default=0.0)
        for plan in first:
            if self.estimate(plan) < top - HOPELESS_DB:
                plans.append(plan)  # for the report
                continue
            second = self._anneal(plan, FULL + NONE, budget, heat=2.0, seed=1)
            best = max(plan, second, key=self.estimate)
            for seed in range(2, 4):
                best = self._anneal(best, FULL + NONE, budget, heat=0.5, seed=seed)
            plans += dict.fromkeys([plan, second, best])  # estimates err by a decibel: the race decides among them
            if self.split is not None:
                plans += self._with_partial_rows(best, self.split, budget)
        plans.sort(key=lambda plan: -self.estimate(plan))
        return plans

    def _proposed(self, predictor: Predictor, budget: Budget) -> Plan | None:
        """A plan without partial rows, by annealing; None: the budget allows none."""
        start = self._start(predictor, budget)
        return None if start is None else self._anneal(start, FULL + NONE, budget, heat=2.0, seed=0)

    def _with_partial_rows(self, base: Plan, split: Drift, budget: Budget) -> list[Plan]:
        """The best plans by estimate with partial rows: for each kind alone, and with several kinds.

        base: the best plan without partial rows. The estimates by `split` are shifted to agree on it.
        """
        self._shift[base.predictor] = self.estimate(base) - split.quality(base, self.kinds)
        partial = self.letters.replace(FULL, "").replace(NONE, "")
        computed = [step for step, letter in enumerate(base.letters) if step and letter == FULL]
        plans = []
        for letter in partial:
            starts = [Plan(replaced(base.letters, step, letter), base.predictor) for step in computed]
            if starts:
                start, letters = max(starts, key=self.estimate), FULL + NONE + letter
                plans.append(
                    self._anneal(start, letters, budget, heat=0.5, seed=4, moves=PARTIAL_MOVES, need_partial=True)
                )
        if len(plans) > 1 and self.variants > 3:
            best = max(plans, key=self.estimate)
            plans.append(self._anneal(best, FULL + NONE + partial, budget, heat=0.5, seed=5, need_partial=True))
        return list(dict.fromkeys(plans))

    def _anneal(
        self,
        start: Plan,
        letters: str,
        budget: Budget,
        heat: float,
        seed: int,
        moves: int = 0,
        need_partial: bool = False,
    ) -> Plan:
        """moves: per step, default `self.moves`; need_partial: only plans with a partial row."""
        allows, total_moves = self._allows(budget), (moves or self.moves) * self.steps

        def allowed(plan: Plan) -> bool:
            return (bool(plan.partial) or not need_partial) and allows(plan)

        plan = anneal(start, letters, self.estimate, allowed, moves=total_moves, heat=heat, seed=seed)
        return polish(plan, self.estimate, allowed)

    def _start(self, predictor: Predictor, budget: Budget) -> Plan | None:
        """The better by estimate of two plans: evenly spaced, and from the dynamic program if it has one."""
        name, allows = predictor.name, self._allows(budget)
        counts = range(1, self.steps + 1)
        count = max((n for n in counts if allows(Plan(FULL * n + NONE * (self.steps - n), name))), default=0)
        if not count:
            return None
        even = tuple(round(n * self.steps / count) for n in range(count))
        gap = max(2, self.drift.lookback // 2)
        errors = self.drift.errors(name, gap)
        optimal = best_refreshes(errors, self.steps, count, gap) if count > 1 else None
        starts = [Plan(plan_of(steps, self.steps), name) for steps in (even, optimal) if steps is not None]
        return max(starts, key=self.estimate)

    def _improve(self, leaders: list[Plan], budget: Budget, seeds: int, challengers: Challengers) -> list[Plan]:
        """Local search by rollouts while the effort lasts: the best neighbors by estimate of the best plan."""
        allows = self._allows(budget)
        tried: set[Plan] = set(self.race.errors)
        while True:
            best = leaders[0]
            price = self.race.price(best)
            reserved = len(self.race.seeds) + seeds + 2 * len(challengers.remaining(best))  # rollouts of later rounds
            if self.race.spent + (reserved + seeds) * price > self.effort:
                return leaders
            letters = "".join(sorted({FULL, NONE, *best.partial}))
            untried = [plan for plan in neighbors(best, letters) if plan not in tried and allows(plan)]
            if not untried:
                return leaders
            plan = max(untried, key=self.estimate)
            tried.add(plan)
            if self.race.run(plan, 1) < self.race.quality(best, 1) - CLOSE_DB:
                continue
            self.race.run(plan, seeds)
            leaders = sorted([*leaders, plan], key=lambda leader: -self.race.quality(leader, seeds))[:3]

    # -- estimates --------------------------------------------------------------------------------------------------

    def _allows(self, budget: Budget) -> Callable[[Plan], bool]:
        return lambda plan: len(plan.partial) <= self.variants - 2 and self.costs.allows(plan, budget)

    def estimate(self, plan: Plan) -> float:
        """The estimated quality, dB up to a constant; -inf if a pair was not measured.

        A plan with partial rows is estimated by `split`, shifted to agree with `drift` on the best plan without them.
        """
        if plan not in self._estimates:
            if plan.partial and self.split is not None:
                quality = self.split.quality(plan, self.kinds) + self._shift[plan.predictor]
            else:
                quality = self.drift.quality(plan, self.kinds)
            self._estimates[plan] = quality
        return self._estimates[plan]

    def _optimistic_estimate(self, plan: Plan) -> float:
        """The estimate; if a pair was not measured, an upper bound."""
        estimate = self.estimate(plan)
        return estimate if estimate > -math.inf else self.drift.quality(plan, self.kinds, clamp=True)

    def _expected(self, plan: Plan) -> float:
        """The optimistic estimate, in what rollouts are compared by."""
        estimate = self._optimistic_estimate(plan)
        if self.floor is None:
            return estimate
        return self.floor.expected(estimate, self.race.errors, self._optimistic_estimate)

    # -- the report -------------------------------------------------------------------------------------------------

    def _report(self, uniform: Collection[Plan], annealed: Sequence[Plan]) -> None:
        """Record the best of each family, those that did not win too."""
        for plan in self.race.errors:
            prefix = "uniform " if plan in uniform else ""
            self._record(plan, self.race.quality(plan, self.race.count(plan)), prefix=prefix)
        reference = max(self.race.errors, key=lambda plan: (self.race.count(plan), plan.letters))
        measured = self.race.quality(reference, self.race.count(reference))
        constant = measured - self._expected(reference)  # from estimates to dB
        for plan in annealed:
            if plan not in self.race.errors and self.estimate(plan) > -math.inf:
                self._record(plan, constant + self._expected(plan), suffix=", by estimate")

    def _record(self, plan: Plan, quality: float, prefix: str = "", suffix: str = "") -> None:
        kinds = "".join(f" with {letter}" for letter in sorted(plan.partial))
        name = f"{prefix}{plan.predictor}{kinds}{suffix}"
        self.family_quality[name] = max(self.family_quality.get(name, -math.inf), quality)

    def _too_tight(self, budget: Budget) -> str:
        """The message for a budget that allows no plan, with the nearest budget that allows one."""
        plans = [cheapest_plan(self.steps, predictor.name) for predictor in self.predictors]
        cheapest = min(plans, key=lambda plan: (self.costs.fraction(plan), self.costs.state_of(plan)))
        state = min(self.costs.state_of(plan) for plan in plans)
        latency = f", latency:{self.costs.fraction(cheapest, 'ms'):.3f}" if self.costs.ms else ""
        return (
            f"budget {budget} can't be kept: the nearest that can is macs:{self.costs.fraction(cheapest):.3f}{latency} "
            f"with state:{state} bytes (one computed step, all others forecast)"
        )
