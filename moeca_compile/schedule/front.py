"""Fronts: the schedules that one calibration found for several budgets, in one file. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.budget import Budget
from moeca_compile.schedule.decode import DecodeError, Entries, parse, read_text, short, write_text
from moeca_compile.schedule.file import FRONT_FORMAT, attributes_from, entries_of

VERSION = 1
TRUTHS = ("_converged_holdout", "_given_holdout", "_holdout", "")  # what a predicted quality is to, the best one first
QUALITIES = tuple(name + truth for truth in TRUTHS for name in ("quality", "psnr_db"))
TOLERANCE = 1e-9  # of the fractions that a budget limits


@dataclass(frozen=True)
class Front:
    """Schedules of one model from the cheapest to the most expensive; immutable.

    Attributes:
        schedules: at least one, with `predicted["mac_fraction"]`. Those of `moeca_compile.calibrate` have more figures.

    Raises:
        ScheduleError: there is no schedule, or one doesn't say what it costs.
    """

    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ScheduleError("a front needs at least one schedule")
        for schedule in self.schedules:
            if "mac_fraction" not in schedule.predicted:
                raise ScheduleError(
                    f"a front's schedules need predicted['mac_fraction']; {short(schedule.made_by)} has none. "
                    "moeca_compile.calibrate predicts it"
                )
        ordered = sorted(self.schedules, key=lambda schedule: schedule.predicted["mac_fraction"])
        object.__setattr__(self, "schedules", tuple(ordered))

    def __iter__(self) -> Iterator[Schedule]:
        return iter(self.schedules)

    def __len__(self) -> int:
        return len(self.schedules)

    def at(self, budget: str) -> Schedule:
        """Choose a schedule by its predicted figures.

        Args:
            budget: as for `moeca_compile.calibrate`. `macs:0.34`, `latency:0.4`, `speedup:2.5`, `state:64MiB`: the
                schedule of best quality within the limits. `psnr:45`: the cheapest one with that quality. Where the
                latency was not measured, `latency` and `speedup` go by the MACs.

        Returns:
            The schedule.

        Raises:
            ScheduleError: a budget that can't be read, or that no schedule keeps. The text says what the nearest is.
        """
        limits = Budget.parse(budget)
        allowed = [schedule for schedule in self.schedules if _is_within(schedule, limits)]
        if not allowed:
            raise ScheduleError(
                f"no schedule of the front keeps {budget}; it has {self._figures()}. Calibrate one with this budget"
            )
        if limits.psnr_db is not None:
            return min(allowed, key=lambda schedule: schedule.predicted["mac_fraction"])
        return max(allowed, key=_quality)

    def _figures(self) -> str:
        figures = []
        for schedule in self.schedules:
            quality = f" with {_quality(schedule):.1f} dB" if math.isfinite(_quality(schedule)) else ""
            figures.append(f"macs:{schedule.predicted['mac_fraction']:.3f}{quality}")
        return ", ".join(figures)

    def to_json(self) -> str:
        """Write the front as versioned JSON, so that `from_json(f.to_json()) == f`.

        Returns:
            The text of the front's file.
        """
        schedules = [entries_of(schedule) for schedule in self.schedules]
        return json.dumps({"format": FRONT_FORMAT, "version": VERSION, "schedules": schedules}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Front:
        """Read what `to_json` wrote.

        Args:
            text: the JSON.

        Returns:
            The front.

        Raises:
            ScheduleError: not a front, a newer version, a malformed schedule.
        """
        try:
            data = parse(text)
            if data.text("format") != FRONT_FORMAT:
                raise ScheduleError(f"format is {short(data.text('format'))}, expected {FRONT_FORMAT!r}")
            version = data.integer("version")
            if version != VERSION:
                raise ScheduleError(f"version {short(version)} is not the one that this package reads ({VERSION})")
            data.reject_unknown(("format", "version", "schedules"))
            return cls(tuple(Schedule(**attributes_from(entries)) for entries in _entries(data.get("schedules"))))
        except (ScheduleError, DecodeError) as error:
            raise ScheduleError(f"not a readable front: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file.

        Args:
            path: the file; an existing one is replaced.

        Raises:
            ScheduleError: the file can't be written.
        """
        try:
            write_text(Path(path), self.to_json() + "\n")
        except DecodeError as error:
            raise ScheduleError(f"front {str(path)!r} can't be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Front:
        """Read a front's JSON file.

        Args:
            path: the file.

        Returns:
            The front.

        Raises:
            ScheduleError: the file can't be read, or is no front; the text names the file.
        """
        try:
            return cls.from_json(read_text(Path(path)))
        except (ScheduleError, DecodeError) as error:
            raise ScheduleError(f"front {str(path)!r}: {error}") from error


def _entries(schedules: Any) -> Sequence[Entries]:
    if not isinstance(schedules, list) or not all(isinstance(entries, dict) for entries in schedules):
        raise ScheduleError(f"schedules is {short(schedules)}, expected a list of schedules")
    return [Entries(entries, f"schedules[{index}]") for index, entries in enumerate(schedules)]


def _quality(schedule: Schedule) -> float:
    """The first of `QUALITIES` that was predicted, dB: to what the schedule was fitted to; -inf: none was."""
    return next((schedule.predicted[name] for name in QUALITIES if name in schedule.predicted), -math.inf)


def _is_within(schedule: Schedule, limits: Budget) -> bool:
    predicted = schedule.predicted
    macs = predicted["mac_fraction"]
    return (
        (limits.macs is None or macs <= limits.macs + TOLERANCE)
        and (limits.latency is None or predicted.get("latency_fraction", macs) <= limits.latency + TOLERANCE)
        and (limits.state_bytes is None or predicted.get("state_bytes", math.inf) <= limits.state_bytes)
        and (limits.psnr_db is None or _quality(schedule) >= limits.psnr_db)
    )
