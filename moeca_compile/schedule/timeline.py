"""Rows that belong to timesteps, met by calls at other timesteps: which row each call runs. Pure data, no torch.

A schedule says at which timesteps each region is computed. A sampler with fewer steps, or with another solver, passes
some of them without a call there. Three rules say what a call computes:

1. A row that was passed since the last call is made up: what it computes, this call computes.
2. A row is computed once: a second call nearest to the same row runs the cheapest row.
3. The time between two computations of a region is at most what it is in the schedule. Where the next call would come
   too late, counted by the length of the last step, this call computes the region, in place of the next row that does.

Regions that do the same in every row are one group. Only rows of the schedule are run: the cheapest one that computes
all that a call has to, the full row at worst. So no call needs a variant that the schedule alone wouldn't need.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeca_compile.schedule.action import Act, Action, Partial, Row

_LATE = 1 + 1e-6  # timesteps are floats
_NEAR = 0.25  # of the distance to the next row's timestep: what rounding to bfloat16 stays within


@dataclass(slots=True)
class Place:
    """Where a stream is: `row` was nearest to its last call, which came at `time`.

    `off` says that a call came elsewhere than the schedule's rows are. Before that there is nothing to keep but
    where the stream began (`first`); afterwards, by group, when it was `computed` last, and the row whose computation
    was done ahead (-1: none).
    """

    row: int
    time: float
    first: int
    off: bool = False
    computed: tuple[float, ...] = ()
    ahead: tuple[int, ...] = ()


class Timeline:
    """The rows of a schedule by their timesteps, which go one way."""

    def __init__(self, rows: Sequence[Row], timesteps: Sequence[float]) -> None:
        self.rows = rows
        self.sign = -1.0 if len(timesteps) > 1 and timesteps[1] < timesteps[0] else 1.0
        self.times = [self.sign * one for one in timesteps]  # rising
        self.end = self.times[-1] + (self.times[-1] - self.times[-2] if len(self.times) > 1 else 0.0)
        alike: dict[tuple[Act, ...], int] = {}  # what a group does in every row, and its first column
        for column, acts in enumerate(zip(*rows, strict=True)):
            alike.setdefault(acts, column)
        self.groups = list(alike)
        self.computed = [[i for i, act in enumerate(acts) if act is Action.COMPUTE] for acts in self.groups]
        self.longest = [self._longest(found) for found in self.computed]
        kinds = {row: number for number, row in enumerate(dict.fromkeys(rows))}
        self.kinds = [_Kind(row, tuple(row[column] for column in alike.values()), _cost(row)) for row in kinds]
        self.kind = [self.kinds[kinds[row]] for row in rows]
        self.cheapest = sorted(self.kinds, key=lambda one: one.cost)

    def nearest(self, timestep: float) -> int:
        """The row nearest to a timestep; the earlier one where two are as near."""
        time = self.sign * timestep
        after = bisect_left(self.times, time)
        if after == len(self.times) or (after and time - self.times[after - 1] <= self.times[after] - time):
            return after - 1
        return after

    def is_at(self, row: int, timestep: float) -> bool:
        """Whether a call is at a row's timestep, but for rounding."""
        around = self.times[max(row - 1, 0) : row + 2]
        room = min((b - a for a, b in itertools.pairwise(around)), default=0.0)
        return abs(self.sign * timestep - self.times[row]) <= _NEAR * room

    def begin(self, timestep: float) -> Place:
        """A stream whose call at `timestep` computes everything."""
        row = self.nearest(timestep)
        return Place(row, self.sign * timestep, row, not self.is_at(row, timestep))

    def go_on(self, place: Place, timestep: float) -> tuple[Row, Place]:
        """The row of the stream's next call, and where the stream is then."""
        row, time = self.nearest(timestep), self.sign * timestep
        if not place.off and row == place.row + 1 and self.is_at(row, timestep):
            return self.rows[row], Place(row, time, place.first)
        return self._make_up(place if place.computed else self._unrolled(place), row, time)

    def _make_up(self, place: Place, row: int, time: float) -> tuple[Row, Place]:
        forward = time > place.time
        passed = range(place.row + 1, row + 1) if forward else range(row, place.row)
        coming = self._next_call(place.time, time)
        ahead, wanted = list(place.ahead), list[set[Act]]()
        for group, acts in enumerate(self.groups):
            due: set[Act] = {acts[one] for one in passed if one != ahead[group]}
            if ahead[group] in passed:
                ahead[group] = -1
            late = abs(coming - place.computed[group]) > self.longest[group] * _LATE
            if late and Action.COMPUTE not in due:
                due.add(Action.COMPUTE)
                ahead[group] = self._next(group, row, forward)
            wanted.append(due)
        run = self._covering(wanted, self.kind[row])
        pairs = zip(run.acts, place.computed, strict=True)
        computed = tuple(time if act is Action.COMPUTE else before for act, before in pairs)
        return run.row, Place(row, time, place.first, True, computed, tuple(ahead))

    def _unrolled(self, place: Place) -> Place:
        """A stream that has run the schedule's own rows so far, with what has to be known from here on."""
        began, computed = place.time if place.row == place.first else self.times[place.first], []
        for found in self.computed:
            last = found[bisect_right(found, place.row) - 1]  # row 0 computes everything
            computed.append(self.times[last] if last > place.first else began)
        return Place(place.row, place.time, place.first, True, tuple(computed), (-1,) * len(self.groups))

    def _covering(self, wanted: Sequence[set[Act]], nearest: _Kind) -> _Kind:
        """The cheapest row that does what every group is to do; the nearest one where it is as cheap."""
        fits = [one for one in self.cheapest if one.covers(wanted)]
        return nearest if nearest in fits and nearest.cost == fits[0].cost else fits[0]

    def _next_call(self, before: float, time: float) -> float:
        """When the next call is to be expected: a step as long as the last one, but not past the schedule's end."""
        coming = 2 * time - before
        return max(min(coming, self.end), time) if time > before else min(max(coming, self.times[0]), time)

    def _next(self, group: int, row: int, forward: bool) -> int:
        """The next row in the direction of travel that computes a group; -1: none."""
        found = self.computed[group]
        at = bisect_right(found, row) if forward else bisect_left(found, row) - 1
        return found[at] if 0 <= at < len(found) else -1

    def _longest(self, found: Sequence[int]) -> float:
        """The longest time that a group isn't computed."""
        times = [self.times[one] for one in found]
        return max((b - a for a, b in itertools.pairwise([*times, self.end])), default=0.0)


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """One of the distinct rows: what it does by group, and what orders it among the others by how much it computes."""

    row: Row
    acts: tuple[Act, ...]
    cost: tuple[int, float]

    def covers(self, wanted: Sequence[set[Act]]) -> bool:
        return all(_does(own, act) for own, acts in zip(self.acts, wanted, strict=True) for act in acts)


def _cost(row: Row) -> tuple[int, float]:
    return sum(act is Action.COMPUTE for act in row), sum(act.rho + act.tau for act in row if isinstance(act, Partial))


def _does(act: Act, wanted: Act) -> bool:
    """Whether an action computes at least what another one does."""
    if act is Action.COMPUTE or wanted in (Action.REUSE, Action.FORECAST):
        return True
    if not (isinstance(act, Partial) and isinstance(wanted, Partial)):
        return False
    return act.rho >= wanted.rho and act.tau >= wanted.tau and act.shared >= wanted.shared


def one_way(timesteps: Iterable[float]) -> bool:
    """Whether timesteps only fall, or only rise."""
    pairs = list(itertools.pairwise(timesteps))
    return all(a < b for a, b in pairs) or all(a > b for a, b in pairs)
