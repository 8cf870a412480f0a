"""A Gauss-Newton step of the weights of all computed steps: its normal equations, seed by seed.

Every sample counts by the inverse of its error, as the mean PSNR does. Sources: Bjorck, Numerical Methods for Least
Squares Problems, 1996, section 9.2; Marquardt, An Algorithm for Least-Squares Estimation of Nonlinear Parameters, SIAM
J. Appl. Math. 11 (1963).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moeca_compile.planner.output.derivatives import Place, derivatives
from moeca_compile.planner.output.emulated import EmulatedSampler, RecordedCalls
from moeca_compile.planner.output.fit import Weights, scales
from moeca_compile.planner.output.gram import Array
from moeca_compile.planner.output.paths import record_path
from moeca_compile.planner.output.sampler import SamplerStep
from moeca_compile.planner.output.study import OutputStudy, psnr_to_wanted
from moeca_compile.schedule import Schedule

NEAR = 0.3  # of the samples' error: how far the emulated run may end from the sampler's
EVEN = 0.02  # of the median error, added to each: a sample that is exact doesn't decide alone


@dataclass(frozen=True)
class Equations:
    """The normal equations of a seed, sample by sample.

    Attributes:
        seed: of the search.
        places: of the weights.
        normal: derivatives by derivatives [N, weights, weights].
        right: derivatives by what the samples miss [N, weights].
        missed: mean squares [N].
        samples: of the schedule [N, ...].
        off: how far the emulated run ends from the sampler's, relative to the first latent; infinite where not finite.
        is_emulated: that is near, and all is finite. If not, nothing else holds.
    """

    seed: int
    places: list[Place]
    normal: Array
    right: Array
    missed: Array
    samples: Tensor
    off: float
    is_emulated: bool

    @classmethod
    def of(cls, study: OutputStudy, seed: int, sampler: Sequence[SamplerStep], schedule: Schedule) -> Equations:
        """By a run of the schedule, and an emulated one.

        Raises:
            CallFailed: the model can't be called by itself.
        """
        rule, calls = schedule.output, RecordedCalls()
        assert rule is not None
        path = record_path(study.sampled, seed, schedule, calls)
        miss = (study.wanted[seed].states[-1] - path.samples).flatten(1).double()
        clock = study.sampled.clock()
        with torch.no_grad():
            emulated = EmulatedSampler(sampler, rule.terms, calls)
            end, places, found = derivatives(emulated, path.states[0], rule.weights, _rounding(study))
        normal, right = np.zeros((len(miss), len(found), len(found))), np.zeros((len(miss), len(found)))
        for sample, missed in enumerate(miss):
            own = found[:, sample].flatten(1).double()
            normal[sample], right[sample] = (own @ own.T).numpy(), (own @ missed).numpy()
        study.sampled.seconds += study.sampled.clock() - clock
        off = float((end - path.samples).double().norm())
        is_emulated = off <= NEAR * float(miss.norm()) and bool(np.isfinite(normal).all() and np.isfinite(right).all())
        share = off / max(float(path.states[0].norm()), 1e-30)
        share = share if math.isfinite(share) else math.inf
        return cls(seed, places, normal, right, miss.square().mean(1).numpy(), path.samples, share, is_emulated)


def _rounding(study: OutputStudy) -> float:
    """The greatest `finfo.eps` of the models' weights."""
    weights = (weight for handle in study.sampled.handles for weight in handle.parameters())
    return max((torch.finfo(weight.dtype).eps for weight in weights if weight.is_floating_point()), default=0.0)


class Step:
    """A step of Gauss-Newton.

    Args:
        equations: of each seed.
        schedule: that they belong to.
    """

    def __init__(self, equations: Sequence[Equations], schedule: Schedule) -> None:
        self.equations, self.schedule = equations, schedule
        self.is_emulated = all(one.is_emulated for one in equations)
        missed = np.concatenate([one.missed for one in equations])
        self.even = max(EVEN * float(np.median(missed)), 1e-30)

    @classmethod
    def of(cls, study: OutputStudy, seeds: Sequence[int], sampler: Sequence[SamplerStep], schedule: Schedule) -> Step:
        """From a schedule. After a seed that isn't emulated the others aren't run.

        Raises:
            CallFailed: the model can't be called by itself.
        """
        equations: list[Equations] = []
        for seed in seeds:
            equations.append(Equations.of(study, seed, sampler, schedule))
            if not equations[-1].is_emulated:
                break
        return cls(equations, schedule)

    def quality(self, study: OutputStudy) -> float:
        """Mean PSNR in dB of the schedule."""
        return psnr_to_wanted(study, ((one.seed, one.samples) for one in self.equations))

    def checked(self, study: OutputStudy, damping: float) -> float:
        """Mean PSNR in dB of each seed with the weights that are fitted to the others."""
        runs = ((one.seed, study.sampled.run(one.seed, self.moved(damping, one.seed))) for one in self.equations)
        return psnr_to_wanted(study, runs)

    def moved(self, damping: float, without: int | None = None) -> Schedule:
        """The schedule after the step.

        Args:
            damping: relative to the squares of the derivatives.
            without: a seed that isn't fitted to.
        """
        rule = self.schedule.output
        assert rule is not None
        fitted = [one for one in self.equations if one.seed != without]
        normal = sum(np.einsum("n,nvw->vw", 1 / (one.missed + self.even), one.normal) for one in fitted)
        right = sum(np.einsum("n,nw->w", 1 / (one.missed + self.even), one.right) for one in fitted)
        scale = scales(np.diag(normal))
        scaled = normal / np.outer(scale, scale) + damping * np.eye(len(scale))
        moves = np.linalg.solve(scaled, right / scale) / scale
        rows = [list(row) for row in rule.weights]
        for (step, term), move in zip(fitted[0].places, moves.tolist(), strict=True):
            rows[step][term] += move
        weights: Weights = tuple(map(tuple, rows))
        return replace(self.schedule, output=replace(rule, weights=weights))
