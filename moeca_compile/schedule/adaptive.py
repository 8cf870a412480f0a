"""Choosing rows while a trajectory runs: the thresholds of an adaptive schedule. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.action import Row
from moeca_compile.schedule.decode import Entries, numbers


@dataclass(frozen=True)
class Adaptive:
    """A step runs the first row whose threshold the drift has reached, the last row below all of them.

    Every step's program hands out, for each sample, how far its signal (what enters the first cached region) is from
    what a forecast would have given: ||x - forecast|| / ||x||, L1. Drift is the sum of that over the steps since the
    last full one, for the worst sample of the batch, so that no sample is cached longer for its neighbours' sake. It is
    known one step late: a step is chosen by what the steps before it showed.

    Attributes:
        thresholds: one for each row but the last, falling: rows[i] runs from thresholds[i] on.
        warmup: so many full steps first, at least 1.
        most: at most so many steps in a row that aren't full.
        floor, ceiling: bounds of the share of full steps, counted from the trajectory's start. `most` comes before the
            ceiling.

    Raises:
        ScheduleError: thresholds that don't fall or aren't positive, a bound out of range.
    """

    thresholds: tuple[float, ...]
    warmup: int = 2
    most: int = 12
    floor: float = 0.0
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", numbers("adaptive: thresholds", self.thresholds))
        falling = sorted(set(self.thresholds), reverse=True)
        if not self.thresholds or list(self.thresholds) != falling or not self.thresholds[-1] > 0:
            raise ScheduleError(f"adaptive: thresholds are {self.thresholds}, expected positive ones that fall")
        if self.warmup < 1 or self.most < 1:
            raise ScheduleError(f"adaptive: warmup={self.warmup} and most={self.most}, expected at least 1")
        if not 0 <= self.floor <= self.ceiling <= 1:
            raise ScheduleError(f"adaptive: floor={self.floor} and ceiling={self.ceiling}, expected 0 <= both <= 1")

    def check_rows(self, rows: Sequence[Row], is_counted: bool) -> None:
        """Check that these thresholds choose among these rows.

        Args:
            rows: of the schedule.
            is_counted: whether the schedule has neither recorded timesteps nor a period.

        Raises:
            ScheduleError: not one threshold for each row but the last, equal rows, or rows that aren't counted.
        """
        if len(self.thresholds) != len(rows) - 1:
            raise ScheduleError(f"adaptive: {len(self.thresholds)} thresholds for {len(rows)} rows, one less is needed")
        if len(set(rows)) != len(rows) or not is_counted:
            raise ScheduleError("adaptive: its rows are different ones, without timesteps and period")

    def to_dict(self) -> dict[str, Any]:
        """Write the thresholds and bounds as plain numbers, for JSON.

        Returns:
            The attributes by name.
        """
        return asdict(self) | {"thresholds": list(self.thresholds)}

    @classmethod
    def from_entries(cls, data: Entries) -> Adaptive:
        """What `to_dict` gave.

        Raises:
            DecodeError, ScheduleError: an entry that isn't known, isn't there or is of another type.
        """
        data.only(("thresholds", "warmup", "most", "floor", "ceiling"))
        return cls(
            thresholds=data.numbers("thresholds"),
            warmup=data.whole("warmup", cls.warmup),
            most=data.whole("most", cls.most),
            floor=data.number("floor", cls.floor),
            ceiling=data.number("ceiling", cls.ceiling),
        )
