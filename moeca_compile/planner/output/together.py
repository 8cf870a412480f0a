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
from dataclasses import replace

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

SHARE = 1.25  # of the calibration's `effort`: what the derivatives of a round may cost
ROUNDS = 3
AGAIN = 1.0  # dB: a round that gains less is the last one
DAMPING = (1e-5, 1e-3, 1e-1)  # of a derivative's square, that rollouts decide between
LEAST = 0.05  # dB that the fit must gain on the seeds that decide
NEAR = 0.3  # of the samples' error: how far the emulated run may end from the sampler's
EVEN = 0.02  # of the median error, added to each: a sample that is exact doesn't decide alone


def fit_together(
    study: OutputStudy, checking: Sequence[int], sampler: Sequence[SamplerStep], start: Schedule, quality: float
) -> tuple[float, Schedule]:  # fmt: skip
    """A schedule with weights that bring the samples nearer, as far as rollouts on other seeds find so.

    Args:
        study: has sampled its seeds.
        checking: the seeds that weights aren't fitted to, unless those are all.
        sampler: the update of each step.
        start: a schedule with an output rule.
        quality: of `start` on the checking seeds, mean PSNR in dB.

    Returns:
        The best quality, and the schedule that has it. `start`, where none is better, where the derivatives on one
        seed cost more than `SHARE` of the effort, or where the sampler's steps can't be emulated.
    """
    fitting = [seed for seed in study.request.seeds if seed not in checking] or list(study.request.seeds)
    fitting = fitting[: int(SHARE * study.request.effort / price(start))]
    if fitting and (size := _bytes(study, sampler, start)) > study.request.memory:
        warn(
            f"calibrate: the weights aren't fitted together: their derivatives take {size} bytes, and memory="
            f"{study.request.memory} are allowed. Raise memory, or take fewer samples a seed"
        )
        return quality, start
    best = quality, start
    rounding = _rounding(study)
    for _ in range(ROUNDS if fitting else 0):
        begin = best
        try:
            normal = _Equations(study, fitting, sampler, begin[1], rounding)
        except (RuntimeError, TypeError, ValueError) as error:
            warn(
                f"calibrate: the weights aren't fitted together, as the model fails outside the sampler's loop: {error}"
            )
            break
        for damping in DAMPING if normal.is_emulated else ():
            schedule = normal.moved(damping)
            reached = psnr_to_wanted(study, ((seed, study.sampled.run(seed, schedule)) for seed in checking))
            best = max(best, (reached, schedule), key=lambda pair: pair[0])
        if best[0] < begin[0] + AGAIN:
            break
    return best if best[0] >= quality + LEAST else (quality, start)


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


class _Equations:
    """One Gauss-Newton step, over some seeds: runs them, and sums up the normal equations.

    Attributes:
        is_emulated: the emulated runs end where the sampler's do, and all is finite. If not, nothing else holds.
    """

    def __init__(
        self, study: OutputStudy, seeds: Sequence[int], sampler: Sequence[SamplerStep], schedule: Schedule,
        rounding: float,
    ) -> None:  # fmt: skip
        self.schedule, self.is_emulated = schedule, True
        runs = [_run(study, seed, schedule) for seed in seeds]
        clock = study.sampled.clock()
        errors = torch.cat([miss.square().mean(1) for *_, miss in runs])
        inverse = 1 / (errors + EVEN * errors.median()).clamp_min(1e-30)
        shares = (inverse / inverse.mean()).split([len(miss) for *_, miss in runs])
        self.normal: Array = np.zeros(())
        self.right: Array = np.zeros(())
        for (calls, path, miss), share in zip(runs, shares, strict=True):
            self._add(sampler, calls, path, miss, share, rounding)
            if not self.is_emulated:
                break
        study.sampled.seconds += study.sampled.clock() - clock
        self.is_emulated &= bool(np.isfinite(self.normal).all() and np.isfinite(self.right).all())

    def _add(
        self, sampler: Sequence[SamplerStep], calls: RecordedCalls, path: Path, miss: Tensor, share: Tensor,
        rounding: float,
    ) -> None:  # fmt: skip
        """Those of a seed. `share`: how much each sample counts."""
        rule = self.schedule.output
        assert rule is not None
        with torch.no_grad():
            emulated = EmulatedSampler(sampler, rule.terms, calls)
            end, self.places, found = derivatives(emulated, path.states[0], rule.weights, rounding)
        off = (end - path.samples).flatten(1).double()
        self.is_emulated &= bool(off.norm() <= NEAR * miss.norm())
        for sample, weight in enumerate(share.tolist()):
            own = found[:, sample].flatten(1).double()
            self.normal = self.normal + weight * (own @ own.T).numpy()
            self.right = self.right + weight * (own @ miss[sample]).numpy()

    def moved(self, damping: float) -> Schedule:
        """The schedule after a step of Gauss-Newton. `damping`: relative to the squares of the derivatives."""
        assert self.schedule.output is not None
        scale = np.sqrt(np.diag(self.normal).clip(1e-300))
        scaled = self.normal / np.outer(scale, scale) + damping * np.eye(len(scale))
        moves = np.linalg.lstsq(scaled, self.right / scale, rcond=None)[0] / scale
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
