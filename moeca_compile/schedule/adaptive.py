"""Adaptive schedules: the thresholds that choose a row while a trajectory runs. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.action import Row
from moeca_compile.schedule.decode import Entries, numbers


@dataclass(frozen=True)
class Adaptive:
    """A step runs the first row whose threshold the drift has reached; below all thresholds it runs the last row.

    Each variant outputs a drift metric per sample: ||x - forecast|| / ||x|| in the L1 norm, where x is the tensor that
    enters the first cached region. The drift is the sum of that metric over the steps since the last full step, for the
    sample of the batch with the largest sum: no sample is cached longer because of the others. The metric is available
    one step late, so a step is chosen by the steps before it.

    Attributes:
        thresholds: one for each row but the last, falling; rows[i] runs if the drift is at least thresholds[i].
            Relative, without unit.
        warmup: full steps at the start, at least 1.
        most: maximum number of consecutive steps that are not full.
        floor: least fraction of full steps, counted from the start of the trajectory.
        ceiling: greatest fraction of full steps; `most` takes precedence over it.

    Raises:
        ScheduleError: the thresholds do not fall or are not positive, or a bound is out of range.
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
        """Decode what `to_dict` returned.

        Raises:
            DecodeError: an entry is unknown, missing or of another type.
            ScheduleError: a value is out of range.
        """
        data.reject_unknown(("thresholds", "warmup", "most", "floor", "ceiling"))
        return cls(
            thresholds=data.numbers("thresholds"),
            warmup=data.integer("warmup", cls.warmup),
            most=data.integer("most", cls.most),
            floor=data.number("floor", cls.floor),
            ceiling=data.number("ceiling", cls.ceiling),
        )
