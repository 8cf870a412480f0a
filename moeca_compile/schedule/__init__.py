"""Schedules: the action of each region at each step (COMPUTE, REUSE, FORECAST or PARTIAL). Pure data, no torch."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeca_compile.errors import OptionError, ScheduleError
from moeca_compile.schedule.action import Act, Action, Partial, Row
from moeca_compile.schedule.adaptive import Adaptive
from moeca_compile.schedule.checks import MAX_ORDER, MAX_ROWS, check_rows, interval_for
from moeca_compile.schedule.control import Control
from moeca_compile.schedule.decode import (
    DecodeError,
    is_positive,
    numbers,
    parse,
    read_text,
    short,
    write_text,
)
from moeca_compile.schedule.file import attributes_from, entries_of
from moeca_compile.schedule.fitted import FittedWeights
from moeca_compile.schedule.granularity import OUTPUT, Granularity
from moeca_compile.schedule.grid import grid
from moeca_compile.schedule.output import OutputRule
from moeca_compile.schedule.timeline import Timeline, is_monotonic

__all__ = ["MAX_ORDER", "Act", "Action", "Control", "Partial", "Row", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """A table of actions, [steps, regions]; immutable.

    Attributes:
        rows: one row per step. With `regions` None a row holds one action, which applies to every region of the graph.
        regions: region keys, in graph order, one per column; None until `bind` fits the schedule to a graph.
        order: the order of FORECAST: 1 (linear) or 2 (quadratic); 0 if no row forecasts.
        period: the last `period` rows repeat without end; 0: the schedule ends with its last row.
        fingerprint: of the graph that the columns belong to; "" fits any graph with these keys.
        granularity: what the columns are, as in `Options`; "" in older files and in schedules for any graph.
        timesteps: one per row, as the model receives them, strictly falling or rising; then rows go by timestep.
        searched_timesteps: they were searched, so they aren't the sampler's own: pass it `timesteps`.
        latent: shape of one sample's latent [...] that the schedule was calibrated with; empty: not known.
        control: how PARTIAL rows choose what they recompute.
        adaptive: if set, each step chooses one of the rows, which go from the most to the least expensive.
        output: fitted weights of what the model returns at each step, for granularity `output`.
        fitted: fitted weights of each region's FORECAST at each step; None: the polynomials of `order`.
        hand_over: of two models in one loop, the second one goes on with what the first one kept, as measured.
        made_by: how the schedule was made, for people.
        predicted: what the maker expects, such as `mac_fraction` (see `moeca_compile.calibrate`).
        speedup: if set, the interval of this uniform schedule isn't known yet: `with_interval` chooses it for a graph.

    Raises:
        ScheduleError: the first row does not compute everything, or an attribute is out of range.
    """

    rows: tuple[Row, ...]
    regions: tuple[str, ...] | None = None
    order: int = 1
    period: int = 0
    fingerprint: str = ""
    granularity: str = ""
    timesteps: tuple[float, ...] = ()
    searched_timesteps: bool = False
    latent: tuple[int, ...] = ()
    control: Control = field(default_factory=Control)
    adaptive: Adaptive | None = None
    output: OutputRule | None = None
    fitted: FittedWeights | None = None
    hand_over: bool = False
    made_by: str = ""
    predicted: Mapping[str, float] = field(default_factory=dict)
    speedup: float | None = None

    def __post_init__(self) -> None:
        width = 1 if self.regions is None else len(self.regions)
        check_rows(self.rows, width, self.order, self.period)
        object.__setattr__(self, "timesteps", numbers("timesteps", self.timesteps))
        for name, value in self.predicted.items():
            numbers(f"predicted {name}", (value,))
        if self.timesteps and (len(self.timesteps) != len(self.rows) or self.period):
            raise ScheduleError("timesteps: one a row is needed, and a schedule that repeats can't have them")
        if self.searched_timesteps and not self.timesteps:
            raise ScheduleError("searched_timesteps is true, but there are no timesteps")
        if not is_monotonic(self.timesteps):
            raise ScheduleError(
                "timesteps must only fall or only rise from row to row. Leave them out where a solver "
                "visits one twice: rows then go by the number of the call"
            )
        if self.adaptive is not None:
            self.adaptive.check_rows(self.rows, is_counted=not (self.timesteps or self.period))
        if self.speedup is not None and self.speedup <= 1:
            raise ScheduleError(f"speedup:{self.speedup:g}: how many times fewer MACs than all steps computed, above 1")
        is_open = bool(self.period) or self.adaptive is not None
        if self.fitted is not None:
            self.fitted.check_rows(self.rows, is_open, self.regions is not None and self.granularity != OUTPUT)
        if self.output is not None:
            self.output.check_rows(len(self.rows), width, is_open, self.granularity)
        if self.granularity:
            try:
                Granularity.parse(self.granularity)
            except OptionError as error:
                raise ScheduleError(f"schedule: {error}") from None

    @classmethod
    def uniform(cls, interval: int, warmup: int = 1, order: int = 1) -> Schedule:
        """Compute the first `warmup` steps, then every `interval`-th. Between them reuse (order 0) or forecast.

        The schedule is open-ended: it fits any graph and any number of steps. `uniform(3)` computes steps 0, 3, 6, ...

        Args:
            interval: steps from one computed step to the next, at least 1.
            warmup: how many steps are computed at the beginning, at least 1.
            order: of the forecast: 0, 1 or 2.

        Returns:
            The schedule, not bound to a graph.

        Raises:
            ScheduleError: numbers that aren't whole or too small, or more rows than a schedule may have.
        """
        if not all(map(is_positive, (interval, warmup))):
            raise ScheduleError(
                f"uniform needs whole numbers interval >= 1 and warmup >= 1, got {short(interval)} and {short(warmup)}"
            )
        if interval + warmup > MAX_ROWS:
            raise ScheduleError(f"uniform: interval + warmup is more than the {MAX_ROWS} rows of a schedule")
        between = (Action.FORECAST if order else Action.REUSE,)
        rows = ((Action.COMPUTE,),) * warmup + (between,) * (interval - 1) + ((Action.COMPUTE,),)
        name = f"uniform:{interval}" + (f":warmup={warmup}" if warmup != 1 else "")
        return cls(rows, order=order if interval > 1 else 0, period=interval, made_by=f"{name}, order {order}")

    @classmethod
    def full(cls) -> Schedule:
        """Compute every region at every step, which is exact.

        Returns:
            The schedule, not bound to a graph.
        """
        return cls(((Action.COMPUTE,),), order=0, period=1, made_by="full")

    @classmethod
    def by_drift(cls, threshold: float, order: int = 1, **bounds: Any) -> Schedule:
        """Compute a full step where the drift since the last one reaches `threshold`. Else reuse (order 0) or forecast.

        Args:
            threshold: the summed drift metric (a ratio of L1 norms, see `Adaptive`) that makes a step a full one.
            order: of the forecast: 0, 1 or 2.
            **bounds: the other attributes of `Adaptive`.

        Returns:
            The adaptive schedule, not bound to a graph.

        Raises:
            ScheduleError: a threshold, order or bound out of range.
        """
        between = Action.FORECAST if order else Action.REUSE
        rows: tuple[Row, ...] = ((Action.COMPUTE,), (between,))
        return cls(rows, order=order, adaptive=Adaptive((threshold,), **bounds), made_by=f"adaptive:{threshold:g}")

    def with_interval(self, cheap: float) -> Schedule:
        """Choose the smallest interval that reaches `speedup` to within 5 %. Without `speedup`, nothing changes.

        Args:
            cheap: MACs of a step that computes no region / MACs of a computed step.

        Returns:
            The uniform schedule.

        Raises:
            ScheduleError: no interval up to 10 reaches the speedup.
        """
        if self.speedup is None:
            return self
        interval = interval_for(self.speedup, cheap)
        made_by = f"speedup:{self.speedup:g} as uniform:{interval}, order {self.order}"
        return replace(type(self).uniform(interval, order=self.order), made_by=made_by)

    @classmethod
    def parse(cls, text: str, order: int = 1) -> Schedule:
        """Read a short form (`full`, `uniform:3`, `uniform:3:warmup=2`, `speedup:2`, `adaptive:0.1`) or a JSON file.

        Args:
            text: the short form; the path of a schedule, which ends with `.json`; or the path of a front and a budget,
                as in `front.json@speedup:2`.
            order: of the forecast, for short forms; a file has its own.

        Returns:
            The schedule.

        Raises:
            ScheduleError: a text that is neither, or a file that can't be read.
        """
        head, *rest = text.split(":")
        if head == "full" and not rest:
            return cls.full()
        if head == "uniform" and rest:
            match = re.fullmatch(r"uniform:(\d{1,9})(?::warmup=(\d{1,9}))?", text)
            if match:
                return cls.uniform(int(match[1]), warmup=int(match[2] or 1), order=order)
        elif head == "speedup" and len(rest) == 1 and re.fullmatch(r"\d{1,9}(\.\d{1,20})?", rest[0]):
            return replace(cls.uniform(2, order=order), speedup=float(rest[0]), made_by=f"{text}, order {order}")
        elif head == "adaptive" and len(rest) == 1 and re.fullmatch(r"\d{0,9}\.?\d{1,20}", rest[0]):
            return cls.by_drift(float(rest[0]), order)
        elif text.endswith(".json"):
            return cls.load(text)
        elif ".json@" in text:
            from moeca_compile.schedule.front import Front

            path, _, budget = text.rpartition("@")
            return Front.load(path).at(budget)
        raise ScheduleError(
            f"schedule {text!r} is not understood; use 'full', 'uniform:3', 'uniform:3:warmup=2', 'speedup:2', "
            "'adaptive:0.1' or a path to a .json"
        )

    def row_index(self, step: int, timestep: float | None = None) -> int | None:
        """Give the row of a step: by the nearest recorded timestep, else by counting.

        Args:
            step: the number of the call in its trajectory, from 0.
            timestep: the call's timestep as the model receives it; None where it isn't known.

        Returns:
            The index into `rows`; None past the end of a schedule that doesn't repeat.
        """
        if self.timesteps and timestep is not None:
            return self.timeline.nearest(timestep)
        if step < len(self.rows):
            return step
        if not self.period:
            return None
        return len(self.rows) - self.period + (step - len(self.rows)) % self.period

    @functools.cached_property
    def timeline(self) -> Timeline:
        """The rows by their recorded timesteps, for calls at other timesteps."""
        return Timeline(self.rows, self.timesteps)

    def depth(self, column: int) -> int:
        """Say how many values of a region are kept.

        Args:
            column: the region's index.

        Returns:
            0: none. 1: its last output. 2 to 4: also the outputs computed before it.
        """
        actions = {row[column] for row in self.rows}
        fitted = 0 if self.output is None else self.output.depth
        if self.fitted is not None:
            fitted = self.fitted.depth(column)
        if Action.FORECAST in actions or self.partials(column):
            return max(1 + self.order, fitted)
        return max(1 if Action.REUSE in actions else 0, fitted)

    def partials(self, column: int) -> tuple[Partial, ...]:
        """Collect the kinds of PARTIAL that a region meets. A region with any keeps an age for each of its tokens.

        Args:
            column: the region's index.

        Returns:
            The distinct PARTIAL actions of the column, in order of first use.
        """
        acts = dict.fromkeys(row[column] for row in self.rows)
        return tuple(act for act in acts if isinstance(act, Partial))

    def distinct_rows(self) -> tuple[Row, ...]:
        """Collect the rows without repeats.

        Returns:
            The distinct rows in order of first use; each becomes one program (variant).
        """
        return tuple(dict.fromkeys(self.rows))

    def bind(self, keys: Sequence[str], fingerprint: str, granularity: str = "") -> Schedule:
        """Fit the schedule to a graph: check its regions, or spread a one-column schedule over all of them.

        Args:
            keys: the graph's region keys, in graph order.
            fingerprint: the graph's fingerprint.
            granularity: what the model is compiled with; "" skips that check.

        Returns:
            The schedule with `regions`, `fingerprint` and `granularity` set.

        Raises:
            ScheduleError: the schedule was made for another granularity or another graph; the text says which regions
                differ.
        """
        if granularity and self.granularity and Granularity.parse(granularity) != Granularity.parse(self.granularity):
            raise ScheduleError(
                f"the schedule is for granularity={self.granularity!r}, the model is compiled with {granularity!r}: "
                f"pass granularity={self.granularity!r}, or make a schedule for {granularity!r}"
            )
        granularity = granularity or self.granularity
        if self.regions is None:
            rows = tuple(row * len(keys) for row in self.rows)
            return replace(self, rows=rows, regions=tuple(keys), fingerprint=fingerprint, granularity=granularity)
        if self.regions != tuple(keys):
            missing = [key for key in self.regions if key not in keys]
            extra = [key for key in keys if key not in self.regions]
            order = "" if missing or extra else " (the same regions in another order)"
            raise ScheduleError(
                f"the schedule is for another graph{order}: "
                f"not in the model: {missing or 'none'}; not in the schedule: {extra or 'none'}. "
                "Make one for this model (moeca_compile.calibrate), or use a uniform schedule"
            )
        if self.fingerprint and self.fingerprint != fingerprint:
            raise ScheduleError(
                f"the schedule was made for graph {self.fingerprint}, this one is {fingerprint}: the regions have the "
                "same names but other parameter shapes. Make a schedule for this model"
            )
        return replace(self, fingerprint=fingerprint, granularity=granularity)

    def to_json(self) -> str:
        """Write the schedule as versioned JSON, so that `from_json(s.to_json()) == s`.

        Returns:
            The text of the schedule's file.

        Raises:
            ScheduleError: a schedule for a speedup, whose interval isn't known yet.
        """
        if self.speedup is not None:
            raise ScheduleError(
                f"speedup:{self.speedup:g} has no rows to save before a graph is known: save explain(model).schedule"
            )
        return json.dumps(entries_of(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what `to_json` wrote.

        Args:
            text: the JSON.

        Returns:
            The schedule.

        Raises:
            ScheduleError: not a schedule, a newer version, a missing or malformed entry.
        """
        try:
            return cls(**attributes_from(parse(text)))
        except (ScheduleError, DecodeError) as error:
            raise ScheduleError(f"not a readable schedule: {error}") from error

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
            raise ScheduleError(f"schedule file {str(path)!r} can't be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule's JSON file.

        Args:
            path: the file.

        Returns:
            The schedule.

        Raises:
            ScheduleError: the file can't be read, or is no schedule; the text names the file.
        """
        try:
            return cls.from_json(read_text(Path(path)))
        except (ScheduleError, DecodeError) as error:
            raise ScheduleError(f"schedule file {str(path)!r}: {error}") from error

    def __str__(self) -> str:
        names = ("every region",) if self.regions is None else self.regions
        tail = f", then the last {self.period} repeat" if self.period else ""
        title = f"{self.made_by or 'schedule'}: {len(names)} x {len(self.rows)} steps{tail}"
        return grid(title, names, self.rows)
