"""The weights of all computed steps fitted together, to the final samples alone: Gauss-Newton steps from a fit of step
by step. Those of cheap steps stay: between two computed steps the same values are weighed, so they add little.

A fit of step by step brings each latent as near to a wanted latent as it can, though only the last one counts, and
takes it that the model returns the same there. Here the derivative of the samples by each weight is measured: the run
goes on from the step with a slightly greater weight. Every sample counts by the inverse of its error, as the mean PSNR
does. Sources: Bjorck, Numerical Methods for Least Squares Problems, 1996, section 9.2; Marquardt, An Algorithm for
Least-Squares Estimation of Nonlinear Parameters, SIAM J. Appl. Math. 11 (1963); and for solvers whose weights are
learned for the final samples Shaul et al., Bespoke Non-Stationary Solvers, ICML 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from moeca_compile.errors import warn
from moeca_compile.planner.output.emulated import EmulatedSampler, RecordedCalls, State
from moeca_compile.planner.output.fit import Weights
from moeca_compile.planner.output.gram import Array
from moeca_compile.planner.output.paths import record_path
from moeca_compile.planner.output.sampler import SamplerStep
from moeca_compile.planner.output.study import OutputStudy, psnr_to_wanted
from moeca_compile.schedule import Action, Schedule

SHARE = 2.5  # of the calibration's `effort`: what the derivatives of a round may cost
ROUNDS = 2
DAMPING = (1e-5, 1e-2, 1.0)  # of a derivative's square, that rollouts decide between
CHANGE = 1e-2  # of the latent by a greater weight, relative to the first latent; at least the root of the rounding
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
        if best is begin:
            break
    return best if best[0] >= quality + LEAST else (quality, start)


def price(schedule: Schedule) -> float:
    """Of the derivatives on one seed, in uncached trajectories: the model's calls after each computed step."""
    return max(sum(later for *_, later in _places(schedule)), 1) / len(schedule.rows)


def _places(schedule: Schedule) -> list[tuple[int, int, int]]:
    """The weights of computed steps whose terms have a value there: step, number of the term, computed steps after."""
    assert schedule.output is not None
    computed = [step for step, row in enumerate(schedule.rows) if row[0] is Action.COMPUTE]
    return [
        (step, number, len(computed) - count)
        for count, step in enumerate(computed, start=1)
        for number, term in enumerate(schedule.output.terms)
        if term == "x" or int(term[1:]) < count
    ]


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
        assert schedule.output is not None
        self.schedule, self.is_emulated, self.rounding = schedule, True, rounding
        self.places = [(step, term) for step, term, _ in _places(schedule)]
        self.normal: Array = np.zeros((len(self.places), len(self.places)))
        self.right: Array = np.zeros(len(self.places))
        runs = [self._run(study, seed, sampler) for seed in seeds]
        if not self.is_emulated:
            return
        errors = torch.cat([miss.square().mean(1) for *_, miss in runs])
        inverse = 1 / (errors + EVEN * errors.median()).clamp_min(1e-30)
        shares = (inverse / inverse.mean()).split([len(miss) for *_, miss in runs])
        clock = study.sampled.clock()
        for (emulated, states, miss), share in zip(runs, shares, strict=True):
            with torch.no_grad():
                derivatives = torch.stack([*self._derivatives(emulated, states)], dim=1)
            for sample, weight in enumerate(share.tolist()):
                own = derivatives[sample].double()
                self.normal += weight * (own @ own.T).numpy()
                self.right += weight * (own @ miss[sample]).numpy()
        study.sampled.seconds += study.sampled.clock() - clock
        self.is_emulated = bool(np.isfinite(self.normal).all() and np.isfinite(self.right).all())

    def _run(
        self, study: OutputStudy, seed: int, sampler: Sequence[SamplerStep]
    ) -> tuple[EmulatedSampler, list[State], Tensor]:  # fmt: skip
        """Of a seed: the emulated sampler, its states, and what the samples miss [N, numbers] float64."""
        rule = self.schedule.output
        assert rule is not None
        calls = RecordedCalls()
        path = record_path(study.sampled, seed, self.schedule, calls)
        miss = (study.wanted[seed].states[-1] - path.samples).flatten(1).double()
        emulated = EmulatedSampler(sampler, rule.terms, calls)
        clock = study.sampled.clock()
        with torch.no_grad():
            states = emulated.run(State(path.states[0]), rule.weights)
        study.sampled.seconds += study.sampled.clock() - clock
        off = (states[-1].latent - path.samples).flatten(1).double()
        self.is_emulated &= bool(off.norm() <= NEAR * miss.norm())
        return emulated, states, miss

    def _derivatives(self, emulated: EmulatedSampler, states: Sequence[State]) -> Iterator[Tensor]:
        """Of the final latents by each weight [N, numbers] float32."""
        assert self.schedule.output is not None
        weights, end = self.schedule.output.weights, states[-1].latent
        change_of_latent = max(CHANGE, math.sqrt(max(self.rounding, emulated.calls.rounding)))
        size = change_of_latent * float(states[0].latent.square().mean().sqrt())
        for step, term in self.places:
            state = replace(states[step], outputs=states[step + 1].outputs)  # the step's own output is known
            values = emulated.values(step, state)[term]
            effect = emulated.sampler[step].effect(values)
            change = size / max(float(effect.square().mean().sqrt()), 1e-12)
            row = [weight + change * (number == term) for number, weight in enumerate(weights[step])]
            last = emulated.run(emulated.moved(step, state, row), weights, step + 1)[-1].latent
            yield (last - end).flatten(1) / change

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
