"""Whether a sampler makes the update that weights of the output were fitted for, for torch and for bundles. No torch.

The model can't see how guidance combines its halves, or how far a step goes. The latent of the second call shows it: a
schedule keeps the sampler's first update, and another guidance scale, solver or prediction type leads elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned

TOLERANCE = 0.03  # of the norm of the latent's first change; a sampler that can be fitted leaves at most 0.01


class SamplerCheck:
    """The check of one schedule, for all streams that run it.

    Args:
        update: factors of the first latent, and of what the model returns at the first step: one, or one for each half
            of a batch in which guidance takes both.
        warned: counts the warnings.
    """

    def __init__(self, update: Sequence[float], warned: Warned) -> None:
        self.update, self.warned = update, warned

    def observer(
        self, state: StreamState, step: int, latent: Callable[[], Any], rounding: float
    ) -> Callable[[Any], None] | None:
        """Check a call: the first step's update is computed, the second step's latent compared with it.

        Args:
            state: of the stream.
            step: number of the call, from 0.
            latent: gives the call's, [B, C, ...], in at least float32; called in the first two steps only.
            rounding: the relative rounding error of the latent's own dtype, without unit.

        Returns:
            What is to be called with the output of the first step, [B, at least C, ...], in at least float32; None at
            every other step.
        """
        if step == 0:
            return partial(self.expect, state, latent())
        if step == 1:
            self.compare(state, latent(), rounding)
        return None

    def expect(self, state: StreamState, latent: Any, output: Any) -> None:
        """After the first step: compute the next latent.

        Args:
            state: of the stream; keeps it.
            latent: the call's, [B, C, ...], in at least float32.
            output: what the caller gets, [B, at least C, ...], likewise.
        """
        keep, *factors = self.update
        if len(latent) % len(factors):
            return  # no halves: the weights aren't used either
        size = len(latent) // len(factors)
        first = latent[:size]
        after = keep * first
        for part, factor in enumerate(factors):
            after = after + factor * output[part * size : (part + 1) * size, : first.shape[1]]
        state.expected = (after, _norm(after - first))

    def compare(self, state: StreamState, latent: Any, rounding: float) -> None:
        """Before the second step: warn if its latent is another one.

        Args:
            state: of the stream.
            latent: the call's, in at least float32.
            rounding: the relative rounding error of the latent's own dtype, without unit.
        """
        expected, state.expected = state.expected, None
        if expected is None:
            return
        after, change = expected
        first = latent[: len(after)]
        if first.shape != after.shape:
            return
        off = _norm(first - after)
        if off > TOLERANCE * change + rounding * _norm(first):
            self.warned.once(
                f"the sampler's first step ends {off / max(change, 1e-30):.0%} of its length away from where it did "
                "when the schedule's output weights were fitted: guidance, solver or step size are others, and the "
                "quality isn't known. Calibrate with this sampler, or run it as it was calibrated"
            )


def _norm(values: Any) -> float:
    return math.sqrt(float((values * values).sum()))
