"""The weights of all computed steps fitted together, to the final samples alone: Gauss-Newton steps from a fit of step
by step. Those of cheap steps stay: between two computed steps the same values are weighed, so they add little.

A fit of step by step brings each latent as near to a wanted latent as it can, though only the last one counts, and
takes it that the model returns the same there. Here the derivative of the samples by each weight is measured
(`derivatives.py`). Every sample counts by the inverse of its error, as the mean PSNR does. Sources: Bjorck, Numerical
Methods for Least Squares Problems, 1996, section 9.2; Marquardt, An Algorithm for Least-Squares Estimation of Nonlinear
Parameters, SIAM J. Appl. Math. 11 (1963); and for solvers whose weights are learned for the final samples Shaul et al.,
Bespoke Non-Stationary Solvers, ICML 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moeca_compile.errors import warn
from moeca_compile.planner.output.derivatives import DIRECTIONS, derivatives
from moeca_compile.planner.output.emulated import EmulatedSampler, RecordedCalls
from moeca_compile.planner.output.fit import Weights
from moeca_compile.planner.output.gram import Array
from moeca_compile.planner.output.paths import Path, record_path
from moeca_compile.planner.output.sampler import SamplerStep
from moeca_compile.planner.output.study import OutputStudy, psnr_to_wanted
from moeca_compile.schedule import Action, Schedule

SHARE = 2.0  # of the calibration's `effort`: what the derivatives of a round may cost
ROUNDS = 3
AGAIN = 1.0  # dB: a round that gains less is the last one
DAMPING = (1e-4, 1e-2)  # of a derivative's square, that rollouts decide between
LEAST = 0.05  # dB that a round must gain
NEAR = 0.3  # of the samples' error: how far the emulated run may end from the sampler's
EVEN = 0.02  # of the median error, added to each: a sample that is exact doesn't decide alone


@dataclass(frozen=True)
class FittedTogether:
    """A fit of all weights.

    Attributes:
        schedule: with the weights that are better by rollouts.
        before: of the weights that it began with, mean PSNR in dB.
        reached: of the best weights, likewise, on seeds that they aren't fitted to (leave-one-out).
    """

    schedule: Schedule
    before: float
    reached: float


def fit_together(study: OutputStudy, sampler: Sequence[SamplerStep], start: Schedule) -> FittedTogether | None:
    """A schedule with weights that bring the samples nearer, as far as rollouts find so.

    Whether a round is better, and how far it goes, is decided seed by seed: the weights are fitted to the others, and
    run on that one. Then they are fitted to all. Source: Stone, Cross-Validatory Choice and Assessment of Statistical
    Predictions, J. R. Stat. Soc. B 36 (1974).

    Args:
        study: has sampled its seeds.
        sampler: the update of each step.
        start: a schedule with an output rule.

    Returns:
        None: the derivatives on two seeds cost more than `SHARE` of the effort or take more memory than is allowed, or
        the sampler's steps can't be emulated.
    """
    seeds = study.request.seeds[: int(SHARE * study.request.effort / price(start))]
    if len(seeds) < 2:
        return None
    if (size := _bytes(study, sampler, start)) > study.request.memory:
        warn(
            f"calibrate: the weights aren't fitted together: their derivatives take {size} bytes, and memory="
            f"{study.request.memory} are allowed. Raise memory, or take fewer samples a seed"
        )
        return None
    found: FittedTogether | None = None
    for _ in range(ROUNDS):
        try:
            fit = _Round(study, seeds, sampler, start)
        except (RuntimeError, TypeError, ValueError) as error:
            warn(
                f"calibrate: the weights aren't fitted together, as the model fails outside the sampler's loop: {error}"
            )
            break
        if not fit.is_emulated:
            break
        found = found or FittedTogether(start, fit.quality, fit.quality)
        reached, damping = max((fit.checked(study, damping), damping) for damping in DAMPING)
        if reached < fit.quality + LEAST:
            break
        start = fit.moved(damping)
        found = replace(found, schedule=start, reached=reached)
        if reached < fit.quality + AGAIN:
            break
    return found


def price(schedule: Schedule) -> float:
    """Of the derivatives on one seed, in uncached trajectories: two runs, and the calls along directions."""
    assert schedule.output is not None
    computed = sum(row[0] is Action.COMPUTE for row in schedule.rows)
    directions = (min(DIRECTIONS, before * len(schedule.output.terms)) for before in range(computed))
    return (2 * computed + sum(directions)) / len(schedule.rows)


def _bytes(study: OutputStudy, sampler: Sequence[SamplerStep], schedule: Schedule) -> int:
    """Of the derivatives on one seed: those of the latent, of what the model returned, and of sums of these."""
    assert schedule.output is not None
    terms = schedule.output.terms
    computed = sum(row[0] is Action.COMPUTE for row in schedule.rows)
    outputs = 1 + max(int(term[1:]) for term in terms if term != "x")
    latents = 2 + (outputs + 2) * len(sampler[0].now)
    return 4 * computed * len(terms) * latents * max(wanted.states[0].numel() for wanted in study.wanted.values())


def _rounding(study: OutputStudy) -> float:
    """The greatest `finfo.eps` of the models' weights."""
    weights = (weight for handle in study.sampled.handles for weight in handle.parameters())
    return max((torch.finfo(weight.dtype).eps for weight in weights if weight.is_floating_point()), default=0.0)


class _Round:
    """The normal equations of one Gauss-Newton step, seed by seed.

    Attributes:
        quality: of the schedule, mean PSNR in dB.
        is_emulated: the emulated runs end where the sampler's do, and all is finite. If not, nothing else holds.
    """

    def __init__(
        self, study: OutputStudy, seeds: Sequence[int], sampler: Sequence[SamplerStep], schedule: Schedule
    ) -> None:  # fmt: skip
        self.schedule, self.is_emulated, self.rounding = schedule, True, _rounding(study)
        runs = {seed: _run(study, seed, schedule) for seed in seeds}
        self.quality = psnr_to_wanted(study, ((seed, path.samples) for seed, (_, path, _) in runs.items()))
        clock = study.sampled.clock()
        errors = torch.cat([miss.square().mean(1) for *_, miss in runs.values()])
        inverse = 1 / (errors + EVEN * errors.median()).clamp_min(1e-30)
        shares = (inverse / inverse.mean()).split([len(miss) for *_, miss in runs.values()])
        self.equations: dict[int, tuple[Array, Array]] = {}
        for (seed, run), share in zip(runs.items(), shares, strict=True):
            self.equations[seed] = self._equations(sampler, *run, share)
            self.is_emulated &= all(np.isfinite(side).all() for side in self.equations[seed])
            if not self.is_emulated:
                break
        study.sampled.seconds += study.sampled.clock() - clock

    def _equations(
        self, sampler: Sequence[SamplerStep], calls: RecordedCalls, path: Path, miss: Tensor, share: Tensor
    ) -> tuple[Array, Array]:  # fmt: skip
        """Both sides, of a seed. `share`: how much each sample counts."""
        rule = self.schedule.output
        assert rule is not None
        with torch.no_grad():
            emulated = EmulatedSampler(sampler, rule.terms, calls)
            end, self.places, found = derivatives(emulated, path.states[0], rule.weights, self.rounding)
        off = (end - path.samples).flatten(1).double()
        self.is_emulated &= bool(off.norm() <= NEAR * miss.norm())
        normal, right = np.zeros((len(found), len(found))), np.zeros(len(found))
        for sample, weight in enumerate(share.tolist()):
            own = found[:, sample].flatten(1).double()
            normal += weight * (own @ own.T).numpy()
            right += weight * (own @ miss[sample]).numpy()
        return normal, right

    def checked(self, study: OutputStudy, damping: float) -> float:
        """The quality on each seed of the weights that are fitted to the others, mean PSNR in dB."""
        runs = ((seed, study.sampled.run(seed, self.moved(damping, seed))) for seed in self.equations)
        return psnr_to_wanted(study, runs)

    def moved(self, damping: float, without: int | None = None) -> Schedule:
        """The schedule after the step.

        Args:
            damping: relative to the squares of the derivatives.
            without: a seed that isn't fitted to.
        """
        assert self.schedule.output is not None
        fitted = [equations for seed, equations in self.equations.items() if seed != without]
        normal, right = (np.sum(sides, axis=0) for sides in zip(*fitted, strict=True))
        scale = np.sqrt(np.diag(normal).clip(1e-300))
        scaled = normal / np.outer(scale, scale) + damping * np.eye(len(scale))
        moves = np.linalg.lstsq(scaled, right / scale, rcond=None)[0] / scale
        rows = [list(row) for row in self.schedule.output.weights]
        for (step, term), move in zip(self.places, moves.tolist(), strict=True):
            rows[step][term] += move
        weights: Weights = tuple(map(tuple, rows))
        return replace(self.schedule, output=replace(self.schedule.output, weights=weights))


def _run(study: OutputStudy, seed: int, schedule: Schedule) -> tuple[RecordedCalls, Path, Tensor]:
    """Of a seed: the calls of the sampler's run, its path, and what its samples miss [N, numbers] float64."""
    calls = RecordedCalls()
    path = record_path(study.sampled, seed, schedule, calls)
    return calls, path, (study.wanted[seed].states[-1] - path.samples).flatten(1).double()
