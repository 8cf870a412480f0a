"""Where the steps lie: which timesteps of the finest converged run the sampler is given.

With fitted weights the latent moves from one computed step to the next by a weighted sum of itself and of the model's
last outputs, whatever the sampler's own update. So how good the weights can be at other timesteps follows from what was
recorded at all steps of the finest converged run. An annealing compares thousands of choices and samples nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from moeca_compile.planner.output.fit import Form, OutputFit
from moeca_compile.planner.output.gram import Grams
from moeca_compile.planner.output.paths import FINER
from moeca_compile.planner.output.place import SMALLEST, computed_steps
from moeca_compile.planner.output.sampler import SamplerStep
from moeca_compile.planner.search.anneal import anneal
from moeca_compile.planner.search.rows import FULL, NONE, Plan

MOVES = 4000  # of an annealing; each is one fit, a few milliseconds
TRIES = 2  # annealings for each placement that is rolled out: they end decibels apart


@dataclass(frozen=True)
class Fine:
    """The finest converged runs of several seeds.

    Attributes:
        grams: with the outputs and the wanted latents of all steps.
        timesteps: of the steps of a run.
        parts: how many the guidance has.
    """

    grams: Grams
    timesteps: tuple[float, ...]
    parts: int

    def at(self, steps: Sequence[int]) -> Grams:
        """Those of a sampler that makes some of the steps."""
        names: dict[Hashable, Hashable] = {("begin",): ("begin",)}
        for number, step in enumerate((*steps, len(self.timesteps))):
            names["wanted", number] = "wanted", step
            if step < len(self.timesteps):
                names |= {("output", number, part): ("output", step, part) for part in range(self.parts)}
        return self.grams.taken(names)


@dataclass(frozen=True)
class Placement:
    """Some steps of the finest run.

    Attributes:
        steps: their numbers.
        letters: of a plan for them: which ones compute the model.
    """

    steps: tuple[int, ...]
    letters: str


def placed(fine: Fine, sampler: Sequence[SamplerStep], form: Form, start: Plan, count: int) -> list[Placement]:
    """Where a plan's steps may lie better.

    Args:
        fine: what was recorded.
        sampler: the update of each step at the sampler's own timesteps.
        form: of the fits.
        start: a plan for the sampler's own timesteps.
        count: of placements, at most.

    Returns:
        The best of `count` x `TRIES` annealings, best first, without repeats; with as many steps as `start`, and no
        more computed.
    """
    total, steps = len(fine.timesteps), len(start.letters)
    # past the last step of the coarser run, nothing is extrapolated from
    usable = total - FINER[-1] // FINER[0] + 1
    limit = start.letters.count(FULL)
    known: dict[str, float] = {}

    def quality(plan: Plan) -> float:
        if plan.letters not in known:
            filled = _filled(plan.letters, steps, total)
            numbers = [number for number, letter in enumerate(filled.letters) if letter == FULL]
            at = [filled.steps[number] for number in numbers]
            # the update's size doesn't matter, for the weights make up for it; how it takes the parts apart does
            moves = [SamplerStep(1.0, sampler[step * steps // total].now) for step in at]
            # cheap steps add nothing to what a move can be, but share its weights
            rows = [after - before for before, after in itertools.pairwise([*numbers, steps])]
            grams = fine.at(at)
            found = OutputFit(moves, rows).fit(grams.fitted, [True] * len(at), form)
            known[plan.letters] = -10 * math.log10(grams.checked.square(found.miss) + SMALLEST)
        return known[plan.letters]

    def allowed(plan: Plan) -> bool:
        return plan.letters.count(FULL) <= limit

    own = {step * total // steps for step, computes in enumerate(computed_steps(start)) if computes}
    begin = Plan("".join(FULL if step in own else NONE for step in range(usable)), start.predictor)
    annealed = dict.fromkeys(
        anneal(begin, (FULL, NONE), quality, allowed, moves=MOVES, heat=1.0, seed=seed) for seed in range(count * TRIES)
    )
    return [_filled(plan.letters, steps, total) for plan in sorted(annealed, key=quality, reverse=True)[:count]]


def _filled(letters: str, count: int, total: int) -> Placement:
    """The computed steps, and cheap ones between: each new one halves the widest gap."""
    computed = [step for step, letter in enumerate(letters) if letter == FULL]
    steps = list(computed)
    while len(steps) < count:
        gaps = [after - before for before, after in zip(steps, [*steps[1:], total], strict=True)]
        widest = max(range(len(gaps)), key=gaps.__getitem__)
        steps.insert(widest + 1, steps[widest] + gaps[widest] // 2)
    return Placement(tuple(steps), "".join(FULL if step in set(computed) else NONE for step in steps))
