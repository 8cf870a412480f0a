"""Which row a call runs when its timestep is not one that the schedule records. Pure data, no torch.

A schedule says at which timesteps each region is computed. A sampler with fewer steps, or with another solver, skips
some of them. Three rules decide what a call computes:

1. A call makes up for every row that was skipped since the previous call: it computes what those rows compute.
2. A row is computed once. A second call that is nearest to the same row runs the cheapest row.
3. The time between two computations of a region is at most the longest such time in the schedule. The next call is
   expected after a step as long as the last one. If that would be too late for a region, the current call computes it,
   in place of the next row that does.

Regions with the same action in every row form one group. A call runs only rows of the schedule: the cheapest row that
computes everything that the call must compute, at worst the full row. So a call never needs a variant that the
schedule by itself does not need.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeca_compile.schedule.action import Act, Action, Partial, Row

_LATE = 1 + 1e-6  # tolerance for timesteps, which are floats
_NEAR = 0.25  # of the distance to the next row's timestep; rounding to bfloat16 stays within it


@dataclass(slots=True)
class TimelinePosition:
    """Where a guidance stream is in the schedule. Times are timesteps with the sign that makes them rise.

    Attributes:
        row: the row nearest to the last call.
        time: of the last call.
        first: the row of the stream's first call.
        off_schedule: a call came at a time that no row records. Until then the two tuples are empty, because they
            follow from `row` and `first`.
        computed: for each group the time when it was last computed.
        ahead: for each group the row whose computation was done ahead of its time; -1: none.
    """

    row: int
    time: float
    first: int
    off_schedule: bool = False
    computed: tuple[float, ...] = ()
    ahead: tuple[int, ...] = ()


class Timeline:
    """The rows of a schedule by their timesteps, which strictly rise or strictly fall.

    Args:
        rows: of the schedule.
        timesteps: one per row, as the model receives them.
    """

    def __init__(self, rows: Sequence[Row], timesteps: Sequence[float]) -> None:
        self.rows = rows
        self.sign = -1.0 if len(timesteps) > 1 and timesteps[1] < timesteps[0] else 1.0
        self.times = [self.sign * timestep for timestep in timesteps]  # rising
        self.end = self.times[-1] + (self.times[-1] - self.times[-2] if len(self.times) > 1 else 0.0)
        first_columns: dict[tuple[Act, ...], int] = {}  # by the actions of a group in every row, its first column
        for column, acts in enumerate(zip(*rows, strict=True)):
            first_columns.setdefault(acts, column)
        self.groups = list(first_columns)
        self.computing_rows = [[i for i, act in enumerate(acts) if act is Action.COMPUTE] for acts in self.groups]
        self.longest = [self._longest_gap(computing) for computing in self.computing_rows]
        distinct = {
            row: _DistinctRow(row, tuple(row[column] for column in first_columns.values()), _cost(row)) for row in rows
        }
        self.distinct_rows = [distinct[row] for row in rows]
        self.by_cost = sorted(distinct.values(), key=lambda candidate: candidate.cost)

    def nearest(self, timestep: float) -> int:
        """The row nearest to a timestep; the earlier one of two that are equally near."""
        time = self.sign * timestep
        after = bisect_left(self.times, time)
        if after == len(self.times) or (after and time - self.times[after - 1] <= self.times[after] - time):
            return after - 1
        return after

    def is_at(self, row: int, timestep: float, eps: float = 0.0) -> bool:
        """Whether a timestep is that of a row, up to rounding. `eps`: relative spacing of the timestep's dtype, where
        several rows may have become one timestep."""
        neighbors = self.times[max(row - 1, 0) : row + 2]
        distance = min((b - a for a, b in itertools.pairwise(neighbors)), default=0.0)
        rounding = eps * abs(timestep) / 2
        return abs(self.sign * timestep - self.times[row]) <= max(_NEAR * distance, rounding)

    def begin(self, timestep: float, eps: float = 0.0) -> TimelinePosition:
        """The position of a stream whose first call, at `timestep`, computes everything."""
        row = self.nearest(timestep)
        while eps and row and self.is_at(row - 1, timestep, eps):
            row -= 1  # of the rows that this timestep may be, the first
        return TimelinePosition(row, self.sign * timestep, row, not self.is_at(row, timestep, eps))

    def advance(self, position: TimelinePosition, timestep: float, eps: float = 0.0) -> tuple[Row, TimelinePosition]:
        """The row of the stream's next call, and the position of the stream after it."""
        time, following = self.sign * timestep, position.row + 1
        if not position.off_schedule and following < len(self.rows) and self.is_at(following, timestep, eps):
            return self.rows[following], TimelinePosition(following, time, position.first)
        row = self.nearest(timestep)
        return self._make_up(position if position.computed else self._expanded(position), row, time)

    def _make_up(self, position: TimelinePosition, row: int, time: float) -> tuple[Row, TimelinePosition]:
        """Choose the row by the three rules; `row` is the one nearest to `time`."""
        forward = time > position.time
        passed = range(position.row + 1, row + 1) if forward else range(row, position.row)
        next_time = self._expected_next_call(position.time, time)
        ahead, required = list(position.ahead), list[set[Act]]()
        for group, acts in enumerate(self.groups):
            due: set[Act] = {acts[passed_row] for passed_row in passed if passed_row != ahead[group]}
            if ahead[group] in passed:
                ahead[group] = -1
            late = abs(next_time - position.computed[group]) > self.longest[group] * _LATE
            if late and Action.COMPUTE not in due:
                due.add(Action.COMPUTE)
                ahead[group] = self._next_computing_row(group, row, forward)
            required.append(due)
        chosen = self._cheapest_that_covers(required, self.distinct_rows[row])
        computed = tuple(
            time if act is Action.COMPUTE else last for act, last in zip(chosen.acts, position.computed, strict=True)
        )
        return chosen.row, TimelinePosition(row, time, position.first, True, computed, tuple(ahead))

    def _expanded(self, position: TimelinePosition) -> TimelinePosition:
        """The position of a stream that has run the schedule's own rows so far, with its two tuples filled in."""
        start = position.time if position.row == position.first else self.times[position.first]
        computed = []
        for computing in self.computing_rows:
            last = computing[bisect_right(computing, position.row) - 1]  # row 0 computes everything
            computed.append(self.times[last] if last > position.first else start)
        ahead = (-1,) * len(self.groups)
        return TimelinePosition(position.row, position.time, position.first, True, tuple(computed), ahead)

    def _cheapest_that_covers(self, required: Sequence[set[Act]], nearest: _DistinctRow) -> _DistinctRow:
        """The cheapest row that does what every group requires; the nearest row if it is equally cheap."""
        covering = [candidate for candidate in self.by_cost if candidate.covers(required)]
        return nearest if nearest in covering and nearest.cost == covering[0].cost else covering[0]

    def _expected_next_call(self, previous: float, time: float) -> float:
        """The time of the next call, if its step is as long as the last one; not past the ends of the schedule."""
        expected = 2 * time - previous
        return max(min(expected, self.end), time) if time > previous else min(max(expected, self.times[0]), time)

    def _next_computing_row(self, group: int, row: int, forward: bool) -> int:
        """The next row in the direction of travel that computes a group; -1: none."""
        computing = self.computing_rows[group]
        index = bisect_right(computing, row) if forward else bisect_left(computing, row) - 1
        return computing[index] if 0 <= index < len(computing) else -1

    def _longest_gap(self, computing: Sequence[int]) -> float:
        """The longest time between two of these rows, or from the last one to the end."""
        times = [self.times[row] for row in computing]
        return max((b - a for a, b in itertools.pairwise([*times, self.end])), default=0.0)


@dataclass(frozen=True, slots=True, eq=False)
class _DistinctRow:
    """A row, its action for each group, and its cost as a key to sort by."""

    row: Row
    acts: tuple[Act, ...]
    cost: tuple[int, float]

    def covers(self, required: Sequence[set[Act]]) -> bool:
        """Whether the row does all the actions that are required of each group."""
        return all(_includes(act, needed) for act, group in zip(self.acts, required, strict=True) for needed in group)


def _cost(row: Row) -> tuple[int, float]:
    """Computed regions; then, between rows with as many, the fractions that PARTIAL computes."""
    return sum(act is Action.COMPUTE for act in row), sum(act.rho + act.tau for act in row if isinstance(act, Partial))


def _includes(act: Act, needed: Act) -> bool:
    """Whether an action computes at least what another action computes."""
    if act is Action.COMPUTE or needed in (Action.REUSE, Action.FORECAST):
        return True
    if not (isinstance(act, Partial) and isinstance(needed, Partial)):
        return False
    return act.rho >= needed.rho and act.tau >= needed.tau and act.shared >= needed.shared


def is_monotonic(timesteps: Iterable[float]) -> bool:
    """Whether timesteps strictly rise or strictly fall."""
    pairs = list(itertools.pairwise(timesteps))
    return all(a < b for a, b in pairs) or all(a > b for a, b in pairs)
