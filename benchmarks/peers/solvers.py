"""Solvers of dx/dt = v from noise (t = 1) to image (t = 0), with as many calls of the velocity as steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
Solver = Callable[[Velocity, Tensor, int], Tensor]


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    for now, after in itertools.pairwise(_grid(steps)):
        x = x + (after - now) * velocity(x, now)
    return x


def adams_bashforth(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Second-order, multistep; the first step is Euler's."""
    before = None
    for now, after in itertools.pairwise(_grid(steps)):
        v = velocity(x, now)
        x = x + (after - now) * (v if before is None else 1.5 * v - 0.5 * before)
        before = v
    return x


def dpm_solver(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    return dpm_solver_over(velocity, x, _grid(steps))


def dpm_solver_over(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """DPM-Solver++ 2M (Lu et al., arXiv 2211.01095, algorithm 2) for the path x = (1 - t) image + t noise.

    The image that the velocity points to, x - t v, is extrapolated linearly in the log signal-to-noise ratio. Where
    that is infinite, the first step and those next to both ends, the order is 1, as the paper's code has it.
    """
    older: tuple[float, Tensor] | None = None  # log-SNR and image of the step before
    for now, after in itertools.pairwise(times):
        image = x - now * velocity(x, now)
        guess = image
        if older is not None and after > 0 and math.isfinite(older[0]):
            ratio = (_log_snr(now) - older[0]) / (_log_snr(after) - _log_snr(now))
            guess = image + (image - older[1]) / (2 * ratio)
        older = (_log_snr(now), image)
        # sigma'/sigma x - alpha' (exp(-h) - 1) image, with exp(-h) = sigma' alpha / (alpha' sigma)
        x = after / now * x + ((1 - after) - after * (1 - now) / now) * guess
    return x


def _grid(steps: int) -> list[float]:
    return [1 - step / steps for step in range(steps + 1)]


def _log_snr(t: float) -> float:
    return math.log((1 - t) / t) if 0 < t < 1 else math.inf if t <= 0 else -math.inf
