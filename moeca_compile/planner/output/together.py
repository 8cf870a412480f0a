"""The weights of all computed steps fitted together, to the final samples alone: Gauss-Newton steps from a fit of step
by step. Those of cheap steps stay: between two computed steps the same values are weighed, so they add little.

A fit of step by step brings each latent as near to a wanted latent as it can, though only the last one counts, and
takes it that the model returns the same there. Here the schedule runs, and the derivative of its samples by each weight
is measured (`derivatives.py`). Source, for solvers whose weights are learned for the final samples: Shaul et al.,
Bespoke Non-Stationary Solvers, ICML 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeca_compile.errors import warn
from moeca_compile.planner.output.derivatives import DIRECTIONS
from moeca_compile.planner.output.emulated import CallFailed
from moeca_compile.planner.output.gauss_newton import Step
from moeca_compile.planner.output.sampler import SamplerStep
from moeca_compile.planner.output.study import OutputStudy
from moeca_compile.schedule import Action, Schedule

SHARE = 2.0  # of the calibration's `effort`: what the derivatives of a round may cost
ROUNDS = 3
AGAIN = 1.0  # dB: a round that gains less is the last one
DAMPING = (1e-4, 1e-2)  # of a derivative's square, that rollouts decide between
LEAST = 0.05  # dB that a round must gain
ROUNDED = 1e-3  # of the first latent: an emulated run that ends so near is the sampler's
MEMORY = 4  # times the calibration's `memory`, on the host


@dataclass(frozen=True)
class FittedTogether:
    """A fit of all weights, to some of the search's seeds.

    Attributes:
        schedule: with the weights that rollouts found better: new ones, or those that the fit began with.
        before: of the weights that it began with, mean PSNR in dB.
        reached: of new weights, likewise; each seed is run with weights that the last step fitted to the other seeds.
        quality: of the schedule's weights: `before`, or what they reached.
        seeds: how many it was fitted to.
    """

    schedule: Schedule
    before: float
    reached: float
    quality: float
    seeds: int


def fit_together(study: OutputStudy, sampler: Sequence[SamplerStep], start: Schedule) -> FittedTogether | None:
    """A schedule with weights that bring the samples nearer, as far as rollouts find so.

    Whether a step is better, and how far it goes, is decided seed by seed (leave-one-out): it is fitted to the others,
    and run on that one. Then it is fitted to all. Source: Stone, Cross-Validatory Choice and Assessment of Statistical
    Predictions, J. R. Stat. Soc. B 36 (1974).

    Args:
        study: has sampled its seeds.
        sampler: the update of each step.
        start: a schedule with an output rule.

    Returns:
        None: `effort` doesn't pay for the derivatives on two seeds. Or, with a warning: they take more memory than is
        allowed, the sampler's steps can't be emulated, or the model fails outside the sampler's loop.
    """
    seeds = study.request.seeds[: int(SHARE * study.request.effort / price(start))]
    if len(seeds) < 2:
        return None
    if (size := _bytes(study, sampler, start)) > MEMORY * study.request.memory:
        return _left_out(
            f"calibrate: the weights aren't fitted together, as their derivatives take {size} bytes, and {MEMORY} "
            f"times memory={study.request.memory} are allowed. Raise memory, or take fewer samples a seed"
        )
    found: FittedTogether | None = None
    for _ in range(ROUNDS):
        try:
            step = Step.of(study, seeds, sampler, start)
        except CallFailed as error:
            return found or _left_out(
                f"calibrate: the weights aren't fitted together, as the model fails outside the sampler's loop: {error}"
            )
        if not step.is_emulated:
            off = max(one.off for one in step.equations)
            if found or off <= ROUNDED:  # the samples are as near as the emulated run can tell
                return found
            return _left_out(
                "calibrate: the weights aren't fitted together, as the sampler's steps, each by itself, don't lead to "
                f"its samples, but {off:.1%} of a latent beside; it may round its latents, or change them between its "
                "steps"
            )
        before = step.quality(study)
        reached, damping = max((step.checked(study, damping), damping) for damping in DAMPING)
        found = replace(found or FittedTogether(start, before, reached, before, len(seeds)), reached=reached)
        if reached < before + LEAST:
            break
        start = step.moved(damping)
        found = replace(found, schedule=start, quality=reached)
        if reached < before + AGAIN:
            break
    return found


def _left_out(text: str) -> FittedTogether | None:
    warn(text)
    return None


def price(schedule: Schedule) -> float:
    """Of the derivatives on one seed, in uncached trajectories: two runs, and the calls along directions."""
    assert schedule.output is not None
    computed = sum(row[0] is Action.COMPUTE for row in schedule.rows)
    directions = (min(DIRECTIONS, before * len(schedule.output.terms)) for before in range(computed))
    return (2 * computed + sum(directions)) / len(schedule.rows)


def _bytes(study: OutputStudy, sampler: Sequence[SamplerStep], schedule: Schedule) -> int:
    """Of the derivatives on one seed: those of the latent and of what the model returned, twice when weights are added,
    and sums of these."""
    rule = schedule.output
    assert rule is not None
    weights = len(rule.terms) * sum(row[0] is Action.COMPUTE for row in schedule.rows)
    latents = 4 + (2 * rule.depth + 2) * len(sampler[0].now)
    return 4 * weights * latents * max(wanted.states[0].numel() for wanted in study.wanted.values())
