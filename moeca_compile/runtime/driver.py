"""The step rule, shared by the torch engine and the bundle's session. No torch here.

The rule says which row a call runs, whether the cache is cold, what happens past the schedule's end, what is kept of
the call, and when state is dropped. An executor calls `choose` before a step, and passes what the variant wrote to
`keep` after it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from zlib import crc32

from moeca_compile.errors import StateError
from moeca_compile.runtime.state import Answer, StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Action, Row, Schedule
from moeca_compile.schedule.forecast import Coefficients, coefficients, padded
from moeca_compile.schedule.made_for import MadeFor, unused

_COUNTED = (
    "the schedule finds its rows by timestep, but this call has no finite timestep that holds for its whole batch: the "
    "row is found by counting calls. Pass one timestep for the batch, or use a schedule without timesteps (uniform)"
)


class Choice(NamedTuple):
    """What a step runs.

    Attributes:
        row: of the schedule.
        cold: `row` is the full row, because the stream's cache can't serve the scheduled row.
    """

    row: Row
    cold: bool


class Agreed(NamedTuple):
    """What the ranks of a spread model would run at a step, compared.

    Attributes:
        cold: the highest rank that has no state for the step; None: all have it.
        rows_differ: the ranks would run different rows.
        drift: the largest of the ranks' drifts; None: none was measured.
    """

    cold: int | None
    rows_differ: bool
    drift: float | None


Agree = Callable[[bool, int, float | None], Agreed]


class StepDriver:
    """The step rule of one schedule, for all streams that run it.

    Args:
        schedule: bound to the graph's regions.
        warned: counts the warnings.
        order: order of forecasts; default: the schedule's.
        agree: compares a step with that of the other ranks: whether this rank is cold, a number for its row, and its
            drift; None: there is one rank.

    Attributes:
        full: the row that computes everything.
    """

    def __init__(
        self, schedule: Schedule, warned: Warned, order: int | None = None, agree: Agree | None = None
    ) -> None:
        self._agree = agree
        self.schedule, self.warned, self.full = schedule, warned, schedule.rows[0]
        self._terms = 1 + (schedule.order if order is None else order)
        columns = range(len(self.full))
        fitted = schedule.fitted
        self._fitted_depths = [] if fitted is None else [fitted.depth(column) for column in columns]
        self._made_for = None if fitted is None else MadeFor(schedule.rows, bool(schedule.timesteps))
        self._computes = {row: Action.COMPUTE in row for row in schedule.rows}
        past = range(len(schedule.rows), len(schedule.rows) + schedule.period)
        # the rows that repeat past the listed ones; empty: the schedule ends
        self._repeated = tuple(schedule.rows[schedule.row_index(step) or 0] for step in past)

    def refuse_surplus(self, step: int, steps: int | None, stream: str = "") -> None:
        """Refuse a call past the declared number of calls.

        Args:
            step: number of the call, from 0.
            steps: how many calls were declared; None: any number.
            stream: name for the message.

        Raises:
            StateError: `step` is past `steps`.
        """
        if steps is not None and step >= steps:
            raise StateError(
                f"the trajectory was declared with steps={steps}, and this is call {step + 1}"
                f"{f' of stream {stream!r}' if stream else ''}: start a new trajectory"
            )

    def choose(self, state: StreamState | None, step: int, timestep: float | None, eps: float = 0.0) -> Choice:
        """Choose the row of `step`, and drop state that can't serve it.

        Args:
            state: of the stream. None: the call belongs to no stream; everything is computed and nothing kept.
            step: number of the call, from 0.
            timestep: of the call. None: it wasn't read; calls are counted to find the row.
            eps: relative spacing of the timestep's dtype, where it is coarse; else 0.

        Returns:
            The row, and whether the step is cold.
        """
        if state is not None and state.finite is not True:
            self._drop_if_not_finite(state, wait=self._agree is not None)
        if self._agree is not None:
            return self._choose_together(self._agree, state, step, timestep, eps)
        if state is None:
            return Choice(self.full, True)
        drift = None if self.schedule.adaptive is None else state.drift()
        return self._choose(state, step, timestep, eps, drift)

    def keep(
        self, state: StreamState, step: int, row: Row, writes: Sequence[int], values: Sequence[Any],
        finite: bool | Answer = True, changed: bool = False,
    ) -> None:  # fmt: skip
        """Commit what the variant of `row` wrote, unless the state that it read turns out not to be finite.

        Args:
            state: of the stream.
            step: number of the call, from 0.
            row: what ran.
            writes: numbers of the slots that the variant wrote.
            values: one for each of these slots.
            finite: whether the model's output is finite. It is checked before the next step that writes state.
            changed: the variant changed state in place.
        """
        if writes or changed:
            if state.finite is not True and self._drop_if_not_finite(state, wait=True):
                return
            state.finite, state.finite_step = finite, step
        if writes or self._computes.get(row, True):
            state.commit(step, row, writes, values)
        else:
            state.last_step, state.place = step, state.coming
        if self.schedule.adaptive is not None:
            state.pace.ran(row == self.full)

    def coefficients(self, state: StreamState, step: int) -> Coefficients:
        """The weights of each region's kept values in its forecast at `step`: the schedule's fitted ones, else those of
        the polynomial of the schedule's order. A weight is 0 where history is missing, which lowers the order."""
        table = coefficients(step, state.history, [min(depth, self._terms) for depth in state.depths])
        fitted = self.schedule.fitted
        if fitted is None or self._made_for is None:
            return table
        reason = self._made_for.mismatch(step, state.coming, state.history, self._fitted_depths)
        if reason:
            self.warned.once(unused(step, "fitted", reason))
            return table
        pairs = zip(fitted.weights[step], table, strict=True)
        return tuple(padded(weights) if weights else polynomial for weights, polynomial in pairs)

    def coefficients_key(self, state: StreamState, step: int) -> Hashable:
        """Equal for steps with equal coefficients."""
        holds = self._made_for is not None and self._made_for.is_placed(step, state.coming)
        return step, tuple(state.history), holds

    def warn_of_counted(self, step: int, timestep: float | None) -> None:
        """Warn for a step of a fused graph, which finds its row by counting calls alone: the step is past the
        schedule's end, or at another timestep than its row was made for."""
        schedule = self.schedule
        if schedule.row_index(step) is None:
            self.warned.once(_past_end(schedule, step))
        elif schedule.timesteps and timestep is not None and not schedule.timeline.is_at(step, timestep):
            self.warned.once(
                f"step {step} is at timestep {timestep:g}, but row {step} of the schedule was made for "
                f"{schedule.timesteps[step]:g}. The fused graph counts steps and doesn't look at timesteps, so the "
                "quality isn't known. Use the bundle's variants (Session), or calibrate and export a schedule for this "
                "sampler"
            )

    def _choose(self, state: StreamState, step: int, timestep: float | None, eps: float, drift: float | None) -> Choice:
        schedule = self.schedule
        if schedule.timesteps and timestep is not None:
            choice = self._by_timestep(state, step, timestep, eps)
        else:
            if schedule.timesteps:
                self.warned.once(_COUNTED)
            row = self._counted(step) if schedule.adaptive is None else self._adaptive(state, step, drift)
            state.coming = None
            cold = row is not self.full and not _has_all(state, step)
            choice = Choice(self.full, row != self.full) if cold else Choice(row, False)
        if choice.cold:
            state.clear()
        return choice

    def _choose_together(
        self, agree: Agree, state: StreamState | None, step: int, timestep: float | None, eps: float
    ) -> Choice:
        """The row that all ranks run. Where one has no state, or they would run different rows, all start cold."""
        is_adaptive = self.schedule.adaptive is not None
        choice, drift = Choice(self.full, True), None
        if state is not None and is_adaptive:
            choice, drift = Choice(self.full, not _has_all(state, step)), state.drift()
        elif state is not None:
            choice = self._choose(state, step, timestep, eps, None)
        agreed = agree(choice.cold, 0 if is_adaptive else _number_of(choice.row), drift)
        is_split = agreed.cold is not None or agreed.rows_differ
        if is_split and not choice.cold:
            self._warn_of_split(step, agreed.cold)
        if state is None or not (is_split or is_adaptive):
            return choice
        if is_split:
            state.clear()
        return self._choose(state, step, timestep, eps, None if is_split else agreed.drift)

    def _warn_of_split(self, step: int, cold: int | None) -> None:
        if cold is None:
            self.warned.once(
                f"the ranks would run different rows at step {step}: all of them compute it in full, so that none "
                "waits for another. Give all ranks one schedule and one loop (moeca_compile.distributed.check_ranks "
                "compares)"
            )
        else:
            self.warned.once(
                f"rank {cold} has no state for step {step}: all ranks compute it in full, so that none waits for "
                "another. A rank loses its state when its weights change, its samples aren't finite, or its loop "
                "differs: do the same on all ranks"
            )

    def _counted(self, step: int) -> Row:
        rows = self.schedule.rows
        if step < len(rows):
            return rows[step]
        if not self._repeated:
            self.warned.once(_past_end(self.schedule, step))
            return self.full
        return self._repeated[(step - len(rows)) % len(self._repeated)]

    def _adaptive(self, state: StreamState, step: int, drift: float | None) -> Row:
        """The row for the drift that the stream's last step measured."""
        assert self.schedule.adaptive is not None
        return self.schedule.rows[state.pace.choose(self.schedule.adaptive, step, drift)]

    def _by_timestep(self, state: StreamState, step: int, timestep: float, eps: float) -> Choice:
        schedule, timeline, before = self.schedule, self.schedule.timeline, state.place
        if before is None or state.last_step != step - 1:
            here = state.coming = timeline.begin(timestep, eps)
            if here.off_schedule or (step == 0 and here.row > 0):
                self.warned.once(_not_calibrated_for(schedule, step, timestep, here.row))
            return Choice(self.full, schedule.rows[here.row] != self.full)
        row, here = timeline.advance(before, timestep, eps)
        state.coming = here
        if here.off_schedule and not before.off_schedule:
            self.warned.once(_not_calibrated_for(schedule, step, timestep, before.row + 1))
        return Choice(row, False)

    def _drop_if_not_finite(self, state: StreamState, wait: bool) -> bool:
        """Drop the state if the output of the last computed step isn't finite, so that NaN doesn't stay in the cache.

        Args:
            state: of the stream.
            wait: wait for the device's answer. False: do nothing while the answer is pending.

        Returns:
            Whether the state was dropped.
        """
        finite = state.finite
        if not isinstance(finite, bool):
            if not (wait or finite.ready()):
                return False
            finite = finite.holds()
        state.finite = True
        if finite:
            return False
        state.clear()
        self.warned.once(
            f"step {state.finite_step} gave values that aren't finite: its state is dropped and the next step computed "
            "in full. If the model overflows, run it in bfloat16 or float32"
        )
        return True


def _has_all(state: StreamState, step: int) -> bool:
    """Whether the state serves any row of `step`: it is of the step before, and every region has an output."""
    return state.last_step == step - 1 and all(state.history)


@lru_cache
def _number_of(row: Row) -> int:
    """The same on every rank."""
    return crc32(str(row).encode())


def _past_end(schedule: Schedule, step: int) -> str:
    return (
        f"step {step} is past the schedule's last row ({len(schedule.rows)} rows): computed in full. Make the schedule "
        "for this number of steps, or use an open-ended one (uniform)"
    )


def _not_calibrated_for(schedule: Schedule, step: int, timestep: float, row: int) -> str:
    """The warning for a call whose timestep isn't the schedule's. `row`: where the schedule's own sampler would be."""
    times = schedule.timesteps
    there = f"has {times[row]:g} there" if step and row < len(times) else f"goes from {times[0]:g} to {times[-1]:g}"
    remedy = "Make a schedule for this sampler (moeca_compile.calibrate), or use a uniform one"
    if schedule.searched_timesteps:
        remedy = "Its timesteps were searched: give the sampler schedule.timesteps"
    return (
        f"step {step} is at timestep {timestep:g}, but the schedule {there}: it was made for another sampler or number "
        f"of steps ({len(times)}). What its rows compute is made up where a call passes them, so the share of computed "
        f"work isn't the planned one, and the quality isn't known. {remedy}"
    )
