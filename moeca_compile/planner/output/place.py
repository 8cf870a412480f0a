"""Which steps compute the model, where the output's weights are fitted: an annealing over fits that samples nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from moeca_compile.planner.output.fit import FittedWeights, Form, OutputFit
from moeca_compile.planner.output.gram import Gram
from moeca_compile.planner.search.anneal import anneal
from moeca_compile.planner.search.rows import FULL, NONE, Plan

MOVES = 2000  # of an annealing; each is one fit, a few milliseconds
RECENT = 8  # fits that a new one may go on from
SMALLEST = 1e-14


def placements(fit: OutputFit, fitted: Gram, checked: Gram, form: Form, start: Plan, count: int) -> list[Plan]:
    """Plans with no more computed steps than `start`.

    Args:
        fit: of the sampler.
        fitted: of the trajectories that the weights are fitted to; it has the outputs of all steps.
        checked: of those that tell how good the weights are.
        form: of the fits.
        start: a plan of computed and forecast steps.
        count: of annealings, each with random numbers of its own.

    Returns:
        The best plan of each annealing, without repeats.
    """
    limit = start.letters.count(FULL)
    known: dict[str, float] = {}
    recent: deque[FittedWeights] = deque(maxlen=RECENT)

    def quality(plan: Plan) -> float:
        if plan.letters not in known:
            fit_of_plan = fit.fit(fitted, computed_steps(plan), form, recent)
            recent.append(fit_of_plan)
            known[plan.letters] = -10 * math.log10(checked.square(fit_of_plan.miss) + SMALLEST)
        return known[plan.letters]

    def allowed(plan: Plan) -> bool:
        return plan.letters.count(FULL) <= limit

    annealed = (
        anneal(start, (FULL, NONE), quality, allowed, moves=MOVES, heat=1.0, seed=seed) for seed in range(count)
    )
    return list(dict.fromkeys(annealed))


def computed_steps(plan: Plan) -> Sequence[bool]:
    """Whether each step of a plan computes the model."""
    return [letter == FULL for letter in plan.letters]
