"""The sampler's own update, read off its uncached runs.

Of almost every deterministic sampler the next latent is linear in the latent, in what the model returned now, and in
what it returned a step before. These few numbers a step are found by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.output.gram import Array, Gram, Value

UNEXPLAINED = 1e-2  # of a latent's change that a linear sampler may leave, as a ratio of norms
BY_CHANCE = 50.0  # an output that adds nothing explains about 1 of as many numbers as there are by chance
RANK = 1e-13  # singular values below, relative to the greatest, count as zero


@dataclass(frozen=True)
class SamplerStep:
    """next latent = keep x latent + sum over the guidance's parts of (now x output + before x the last step's output).

    Attributes:
        keep: factor of the latent.
        now: factors of the parts of this step's output.
        before: factors of the parts of the last step's output; empty for a sampler of first order.
    """

    keep: float
    now: tuple[float, ...]
    before: tuple[float, ...] = ()

    def constant(self, latent: Value, last: Sequence[Value]) -> Value:
        """What the next latent has without this step's output."""
        total = self.keep * latent
        for factor, part in zip(self.before, last, strict=False):
            total = total + factor * part
        return total

    def effect(self, parts: Sequence[Value]) -> Value:
        """What an output, or a term of it, adds to the next latent."""
        total = self.now[0] * parts[0]
        for factor, part in zip(self.now[1:], parts[1:], strict=True):
            total = total + factor * part
        return total


def sampler_steps(uncached: Gram, steps: int, parts: int, rounding: float = 0.0) -> list[SamplerStep]:
    """The update of each step.

    Args:
        uncached: of uncached trajectories, with their own latents as the wanted ones.
        steps, parts: their numbers.
        rounding: `finfo.eps` of the latents' dtype; what they were rounded by may stay unexplained.

    Raises:
        ScheduleError: a step isn't linear in what the model returns.
    """
    return [_sampler_step(uncached, step, parts, rounding) for step in range(steps)]


def _rank(products: Array) -> int:
    return int(np.linalg.matrix_rank(products, RANK * len(products), hermitian=True))


def _sampler_step(uncached: Gram, step: int, parts: int, rounding: float) -> SamplerStep:
    """First without the step before, then with it."""
    now, after = uncached.vector("wanted", step), uncached.vector("wanted", step + 1)
    moved = uncached.square(after - now)
    # of a number in [1, 2), rounded to a multiple of eps; both latents were rounded
    rounded = rounding**2 / 12 * (uncached.square(now) + uncached.square(after))
    found: tuple[float, SamplerStep] | None = None
    for has_memory in (False, True) if step else (False,):
        columns = [now, *(uncached.vector("output", step, part) for part in range(parts))]
        if has_memory:
            columns += [uncached.vector("output", step - 1, part) for part in range(parts)]
        matrix = np.stack(columns)
        # the change is fitted, not the latent: it is the smaller one, so less is lost to rounding
        normal, right = matrix @ uncached.products @ matrix.T, matrix @ uncached.products @ (after - now)
        scale = np.sqrt(np.diag(normal).clip(1e-300))
        scaled = normal / np.outer(scale, scale)
        solved = np.linalg.lstsq(scaled, right / scale, rcond=RANK)[0] / scale
        left = uncached.square(after - now - solved @ matrix)
        if left <= UNEXPLAINED**2 * moved + rounded:
            # parts that are alike (guidance that changes nothing) may share their factor in any way; the latent may not
            if found is None and _rank(scaled) == _rank(scaled[1:, 1:]):
                raise ScheduleError(
                    f"calibrate: step {step} of the sampler: what the model returns is proportional to the latent on "
                    "all seeds, so what the sampler makes of each can't be told apart, and the output's weights can't "
                    "be fitted (a singular fit). Use granularity='region' or the schedules without weights "
                    "(uniform), or a model that isn't linear in its latent"
                )
            keep, *others = solved.tolist()
            if found is None or (found[0] - left) * uncached.numbers > BY_CHANCE * left:
                found = left, SamplerStep(1 + keep, tuple(others[:parts]), tuple(others[parts:]))
            if found[0] <= UNEXPLAINED**2 * moved:
                break  # else rounding explains it, or hides what the step before adds
    if found is not None:
        return found[1]
    raise ScheduleError(
        f"calibrate: step {step} of the sampler isn't linear in what the model returns (it leaves "
        f"{(left / max(moved, 1e-30)) ** 0.5:.1%} of the state's change unexplained), so the output's weights can't be "
        "fitted. A sampler that draws noise at its steps is one; use its deterministic form"
    )
