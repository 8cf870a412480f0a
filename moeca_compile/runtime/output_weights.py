"""Which weights of a schedule's output rule hold at a step, for the torch engine and the bundle's session. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Action, Schedule
from moeca_compile.schedule.output import MAX_OUTPUTS


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
        self._is_timed = bool(schedule.timesteps)
        self._histories: list[tuple[int, ...]] = []  # of each step, the steps whose outputs its weights are for
        history: tuple[int, ...] = ()
        for step, row in enumerate(schedule.rows):
            if row[0] is Action.COMPUTE:
                history = (step, *history[: MAX_OUTPUTS - 1])
            self._histories.append(history)
            self.rule.check_step(step, len(history))

    def at(self, state: StreamState, step: int, computes: bool, shape: Sequence[int]) -> tuple[float, ...] | None:
        """The weights of a step, by term.

        A rule for timesteps doesn't serve a call without one timestep for its batch (NaN, or one for each sample): the
        row is found by counting, and nobody knows whether it fits.

        Args:
            state: of the stream, after the step rule chose the row.
            step: number of the call, from 0.
            computes: whether the step computes the model.
            shape: of the model's output.

        Returns:
            None where the polynomial serves: the rule has no weights for the step, or they were made for another step
            or history. The latter is warned of.
        """
        history = (step, *state.history[0]) if computes else state.history[0]
        reason = self._mismatch(state, step, history, shape)
        if reason:
            self.warned.once(
                f"step {step}: the schedule's output weights aren't used, for {reason}. The output is what the "
                f"schedule's order makes it. Calibrate for this sampler, or run it as it was calibrated"
            )
            return None
        return self.rule.weights[step] or None

    def _mismatch(self, state: StreamState, step: int, history: tuple[int, ...], shape: Sequence[int]) -> str:
        """Why the weights of a step don't hold; "" if they do."""
        rule, place = self.rule, state.coming
        if self._is_timed and place is None:
            return "the call has no finite timestep that holds for its whole batch"
        if step >= len(rule.weights) or (place is not None and (place.off_schedule or place.row != step)):
            return "the call comes at another step or timestep"
        if history[: rule.depth] != self._histories[step][: rule.depth]:
            return "the steps that computed the model before are others"
        if rule.halves and (not shape or shape[0] % 2):
            return "the batch has no two halves"
        if "x" in rule.terms and not self.has_latent:
            return "no input was found to be the latent"
        return ""
