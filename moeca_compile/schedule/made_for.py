"""Whether a step is one that a schedule's fitted weights were made for. Pure data, no torch.

Weights are fitted for one step of one schedule: for its timestep, and for values that were computed at certain steps
before. Where a call comes at another timestep, or after other steps, they don't hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.schedule.action import Action, Row
from moeca_compile.schedule.forecast import MAX_KEPT
from moeca_compile.schedule.timeline import TimelinePosition

Histories = Sequence[tuple[int, ...]]  # of each column, the steps that computed it, latest first


class MadeFor:
    """The steps of a schedule, as its weights were fitted for them.

    Args:
        rows: of the schedule.
        is_timed: whether it has timesteps.
    """

    def __init__(self, rows: Sequence[Row], is_timed: bool) -> None:
        self.is_timed = is_timed
        self.before: list[list[tuple[int, ...]]] = []  # by step, of each column the steps that computed it until then
        histories: list[tuple[int, ...]] = [()] * len(rows[0])
        for step, row in enumerate(rows):
            self.before.append(histories)
            histories = [
                (step, *history[: MAX_KEPT - 1]) if action is Action.COMPUTE else history
                for action, history in zip(row, histories, strict=True)
            ]

    def mismatch(
        self, step: int, position: TimelinePosition | None, histories: Histories, depths: Sequence[int]
    ) -> str:
        """Say why the weights of a step don't hold.

        Args:
            step: number of the call, from 0.
            position: of the call in a schedule with timesteps; None: it has none, or the call's timestep wasn't read.
            histories: the steps that computed each column before this one.
            depths: for each column, how many of its values are weighed.

        Returns:
            The reason; "" if the weights hold.
        """
        if self.is_timed and position is None:
            return "the call has no finite timestep that holds for its whole batch"
        if step >= len(self.before) or not self.is_placed(step, position):
            return "the call comes at another step or timestep"
        for expected, history, depth in zip(self.before[step], histories, depths, strict=True):
            if history[:depth] != expected[:depth]:
                return "the steps that computed the model before are others"
        return ""

    def is_placed(self, step: int, position: TimelinePosition | None) -> bool:
        """Whether a call runs the schedule's own row of its step, at that row's timestep. As in `mismatch`."""
        if position is None:
            return not self.is_timed
        return not position.off_schedule and position.row == step


def unused(step: int, kind: str, reason: str) -> str:
    """The warning for weights that don't hold at a step. `kind`: of the weights, such as "output"."""
    return (
        f"step {step}: the schedule's {kind} weights aren't used, for {reason}. The output is what the schedule's "
        "order makes it. Calibrate for this sampler, or run it as it was calibrated"
    )


def timesteps_line(timesteps: Sequence[float], are_searched: bool) -> str:
    """The timesteps that a schedule was made for, for people; "": any."""
    if not timesteps:
        return ""
    line = f"the schedule was made for {len(timesteps)} timesteps, {timesteps[0]:g} to {timesteps[-1]:g}"
    return line + ", which were searched: give the sampler schedule.timesteps" * are_searched
