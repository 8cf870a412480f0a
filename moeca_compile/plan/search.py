"""Find the best plan within a budget: propose by estimate, decide by rollouts.

Every uniform plan that the budget allows, with every predictor, is a candidate, and so are annealed ones. The most
promising of both are rolled out, more of them on few seeds than on many. What is returned has been sampled with every
seed. So have the uniform plans that come near it, by estimate first and then by rollouts: on those seeds it is no worse
than any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from moeca_compile.errors import ScheduleError
from moeca_compile.plan.anneal import anneal, neighbours, polish
from moeca_compile.plan.budget import Budget
from moeca_compile.plan.cost import Costs
from moeca_compile.plan.drift import Drift, cheapest_plan, full_plan
from moeca_compile.plan.predict import Predictor
from moeca_compile.plan.race import Race
from moeca_compile.plan.refresh import best_refreshes, plan_of
from moeca_compile.plan.rows import FULL, NONE, Kinds, Plan, uniform_letters

NEAR_DB = 0.5  # a uniform plan so near the winner on the seeds both have seen is rolled out on all of them
CLOSE_DB = 3.0  # a uniform plan whose estimate is that near the winner's is rolled out, on one seed at least
HOPELESS_DB = 6.0  # behind the best estimate: not raced
RACED = 4  # seeds that candidates are compared on before the last round


@dataclass
class Search:
    """One search over plans of `steps` letters.

    Attributes:
        kinds: the row kinds of the graph; `letters`: those that plans may use, the partial ones in order of trial.
        effort: what the rollouts may cost together, in uncached trajectories; the last round is made in any case.
        found: the best plan of each family that was looked at, and its quality in dB on the seeds it has seen.
    """

    steps: int
    kinds: Kinds
    costs: Costs
    drift: Drift
    race: Race
    predictors: Sequence[Predictor]
    letters: str = FULL + NONE
    effort: float = 32.0
    moves: int = 40  # of one annealing, a step
    found: dict[str, float] = field(default_factory=dict)
    _estimates: dict[Plan, float] = field(default_factory=dict, repr=False)

    def best(self, budget: Budget) -> Plan:
        """The plan of best quality that the budget allows.

        Raises:
            ScheduleError: not even the cheapest plan keeps within it.
        """
        if self.costs.allows(full_plan(self.steps), budget):
            plan = full_plan(self.steps)
            self.race.run(plan, len(self.race.seeds))
            return plan
        uniform = self._uniform(budget)
        planned = self._planned(budget)
        if not uniform and not planned:
            raise ScheduleError(self.too_tight(budget))
        raced = min(RACED, len(self.race.seeds))
        hopeful = [plan for plan in planned if self._estimate(plan) >= self._estimate(planned[0]) - HOPELESS_DB]
        best_of = {(plan.predictor, plan.partial): plan for plan in reversed(planned)}
        for plan in best_of.values():
            self.race.run(plan, 1)  # the hopeless get one look, for the report
        winners = self.race.halve(hopeful, 2, raced, 3) if planned else []
        rulers = self.race.halve(self._promising(uniform), 1, raced, 2) if uniform else []
        if winners:
            winners = self._improve(winners, budget, raced)
        plan = self._decide(winners, rulers, uniform)
        self._note(set(uniform))
        return plan

    def _decide(self, winners: Sequence[Plan], rulers: Sequence[Plan], uniform: Sequence[Plan]) -> Plan:
        """The last round, on all seeds: the winner, the runner-up if it is near, and every uniform plan that is."""
        everyone = len(self.race.seeds)
        raced = min(RACED, everyone)
        ranked = sorted([*winners, *rulers], key=lambda plan: -self.race.quality(plan, raced))
        lead = self.race.quality(ranked[0], raced)
        near = [plan for plan in ranked if self.race.quality(plan, raced) >= lead - NEAR_DB]
        final = self.race.halve(near[:3], min(2 * raced, everyone), everyone, 2)
        best = max(final, key=lambda plan: self.race.run(plan, everyone))
        close = [plan for plan in uniform if self._estimate(plan) >= self._estimate(best) - CLOSE_DB]
        for plan in dict.fromkeys([*rulers, *close]):
            if plan != best and self._challenges(plan, best):
                best = plan
        return best

    def _challenges(self, plan: Plan, best: Plan) -> bool:
        """Whether the plan is better on all seeds; given up as soon as it is far behind on those that it has seen."""
        for seeds in range(1, len(self.race.seeds) + 1):
            if self.race.run(plan, seeds) < self.race.quality(best, seeds) - max(NEAR_DB, 2.0 / seeds):
                return False
        return self.race.quality(plan, len(self.race.seeds)) > self.race.quality(best, len(self.race.seeds))

    # -- candidates -------------------------------------------------------------------------------------------------

    def _uniform(self, budget: Budget) -> list[Plan]:
        """Every uniform plan within the budget, the most promising by estimate first."""
        letters = dict.fromkeys(
            uniform_letters(self.steps, interval, warmup)
            for interval in range(1, self.steps + 1)
            for warmup in range(1, self.steps)
        )
        plans = [Plan(one, predictor.name) for one in letters for predictor in self.predictors]
        allowed = [plan for plan in plans if self.costs.allows(plan, budget)]
        allowed.sort(key=lambda plan: (-self._estimate(plan), -self.costs.fraction(plan)))
        return allowed

    def _promising(self, uniform: Sequence[Plan]) -> list[Plan]:
        """The three best by estimate, the best of each predictor, and without estimates the dearest."""
        known = [plan for plan in uniform if self._estimate(plan) > -math.inf]
        each = [next((p for p in known if p.predictor == one.name), None) for one in self.predictors]
        dearest = sorted(uniform, key=lambda plan: -self.costs.fraction(plan))
        chosen = [*known[:3], *(plan for plan in each if plan is not None), *([] if known else dearest[:6])]
        return list(dict.fromkeys(chosen))

    def _planned(self, budget: Budget) -> list[Plan]:
        """Annealed plans: of each predictor, all rows in step, then with partial rows where the estimate gains."""
        plans: list[Plan] = []
        for predictor in self.predictors:
            start = self._start(predictor, budget)
            if start is None:
                continue
            both = [self._anneal(start, FULL + NONE, budget, heat=2.0, seed=seed) for seed in range(2)]
            whole = max(both, key=self._estimate)
            for seed in range(2, 4):
                whole = self._anneal(whole, FULL + NONE, budget, heat=0.5, seed=seed)
            plans += dict.fromkeys([*both, whole])  # estimates err by a decibel: the race decides among them
            for letter in self.letters.replace(FULL, "").replace(NONE, ""):
                mixed = self._anneal(whole, FULL + NONE + letter, budget, heat=0.5, seed=4)
                if mixed.partial:
                    plans.append(mixed)
        plans.sort(key=lambda plan: -self._estimate(plan))
        return plans

    def _anneal(self, start: Plan, letters: str, budget: Budget, heat: float, seed: int) -> Plan:
        inside = self._inside(budget)
        moves = self.moves * self.steps
        found = anneal(start, letters, self._estimate, inside, moves=moves, heat=heat, seed=seed)
        return polish(found, self._estimate, inside)

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
        return max(starts, key=self._estimate)

    def _improve(self, winners: list[Plan], budget: Budget, raced: int) -> list[Plan]:
        """Local search by rollouts: the likeliest neighbours of the best plan, while the effort lasts."""
        inside = self._inside(budget)
        reserve = 2 * (len(self.race.seeds) - raced) * self.race.price(winners[0])
        tried: set[Plan] = set(self.race.seen)
        while self.race.spent + reserve + raced * self.race.price(winners[0]) < self.effort:
            best = winners[0]
            near = [plan for plan in neighbours(best, self._letters_of(best)) if plan not in tried and inside(plan)]
            if not near:
                break
            plan = max(near, key=self._estimate)
            tried.add(plan)
            if self.race.run(plan, 1) < self.race.quality(best, 1) - NEAR_DB:
                continue
            self.race.run(plan, raced)
            winners = sorted([*winners, plan], key=lambda one: -self.race.quality(one, raced))[:3]
        return winners

    def _letters_of(self, plan: Plan) -> str:
        return "".join(sorted({FULL, NONE, *plan.partial}))

    # -- small helpers ----------------------------------------------------------------------------------------------

    def _inside(self, budget: Budget) -> Callable[[Plan], bool]:
        return lambda plan: self.costs.allows(plan, budget)

    def _estimate(self, plan: Plan) -> float:
        if plan not in self._estimates:
            self._estimates[plan] = self.drift.quality(plan, self.kinds)
        return self._estimates[plan]

    def _note(self, uniform: Collection[Plan]) -> None:
        """Keep the best of each family for the report: what won, and what did not."""
        for plan in self.race.seen:
            family = f"uniform {plan.predictor}" if plan in uniform else plan.predictor
            name = f"{family}{''.join(f' with {letter}' for letter in sorted(plan.partial))}"
            quality = self.race.quality(plan, self.race.count(plan))
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
