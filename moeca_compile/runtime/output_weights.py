"""Which weights of a schedule's output rule hold at a step, for the torch engine and the bundle's session. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.runtime.sampler_check import SamplerCheck
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.made_for import MadeFor, unused


class OutputWeights:
    """The output rule of a schedule, for all streams that run it.

    Args:
        schedule: with an output rule.
        warned: counts the warnings.
        has_latent: whether an input of the model is known to be the latent.

    Raises:
        ScheduleError: a step weighs an output that isn't there by then.
    """

    def __init__(self, schedule: Schedule, warned: Warned, has_latent: bool) -> None:
        assert schedule.output is not None
        self.rule, self.warned, self.has_latent = schedule.output, warned, has_latent
        self.terms = self.rule.terms
        self._made_for = MadeFor(schedule.rows, bool(schedule.timesteps))
        self.rule.check_history(schedule.rows)
        self.sampler = SamplerCheck(self.rule.update, warned) if self.rule.update and has_latent else None

    def at(self, state: StreamState, step: int, shape: Sequence[int]) -> tuple[float, ...] | None:
        """The weights of a step, by term.

        A rule for timesteps doesn't serve a call without one timestep for its batch (NaN, or one for each sample): the
        row is found by counting, and nobody knows whether it fits.

        Args:
            state: of the stream, after the step rule chose the row.
            step: number of the call, from 0.
            shape: of the model's output.

        Returns:
            None where the polynomial serves: the rule has no weights for the step, or they were made for another step
            or history. The latter is warned of.
        """
        reason = self._made_for.mismatch(step, state.coming, state.history, (self.rule.depth,))
        reason = reason or self._missing(shape)
        if reason:
            self.warned.once(unused(step, "output", reason))
            return None
        return self.rule.weights[step] or None

    def _missing(self, shape: Sequence[int]) -> str:
        """What the rule needs and the call doesn't have; "" if it has everything."""
        if self.rule.halves and (not shape or shape[0] % 2):
            return "the batch has no two halves"
        if "x" in self.rule.terms and not self.has_latent:
            return "no input was found to be the latent"
        return ""
