"""A schedule says for every step what each region does: all, nothing, a forecast, a part. Pure data, no torch."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeca_compile.action import Act, Action, Partial, Row, legend_of, read, written
from moeca_compile.adaptive import Adaptive
from moeca_compile.control import Control
from moeca_compile.errors import OptionError, ScheduleError
from moeca_compile.granularity import Granularity
from moeca_compile.timeline import Timeline, one_way

FORMAT, VERSION = "moeca-schedule", 2
MAX_ORDER = 2
_GLYPH: dict[Act, str] = {Action.COMPUTE: "#", Action.REUSE: "=", Action.FORECAST: "/"}

__all__ = ["MAX_ORDER", "Act", "Action", "Control", "Partial", "Row", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Rows x regions, immutable.

    Attributes:
        rows: one row a step. With `regions` None a row holds one action, meant for every region of the graph.
        regions: region keys, in graph order, one a column; None until `bind` fits the schedule to a graph.
        order: of FORECAST: 1 (linear) or 2; 0 where no row forecasts.
        period: the last `period` rows repeat for ever; 0: the schedule ends with its last row.
        fingerprint: of the graph that the columns belong to ("" = any graph with these keys).
        granularity: what the columns are, as in `Options` ("" = not said: older files, and schedules for any graph).
        timesteps: the timestep of each row, as the model receives it, falling or rising; then a call takes the row
            nearest to its own, and makes up what the rows computed that were passed (`moeca_compile.timeline`).
        control: how PARTIAL rows choose what they recompute.
        adaptive: then the rows, from dear to cheap, are what each step chooses from while it runs.
        made_by: how the schedule was made, for people.
        predicted: figures its maker expected, such as `mac_fraction`.

    Raises:
        ScheduleError: the first row doesn't compute everything, rows of unequal length, an order out of range, an
            unknown granularity.
    """

    rows: tuple[Row, ...]
    regions: tuple[str, ...] | None = None
    order: int = 1
    period: int = 0
    fingerprint: str = ""
    granularity: str = ""
    timesteps: tuple[float, ...] = ()
    control: Control = field(default_factory=Control)
    adaptive: Adaptive | None = None
    made_by: str = ""
    predicted: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise ScheduleError("a schedule needs at least one row")
        width = 1 if self.regions is None else len(self.regions)
        for step, row in enumerate(self.rows):
            if len(row) != width:
                raise ScheduleError(f"row {step} has {len(row)} actions, expected {width} (one a region)")
        if any(action is not Action.COMPUTE for action in self.rows[0]):
            raise ScheduleError("row 0 must be all COMPUTE: nothing can be reused before it was computed")
        if not 0 <= self.order <= MAX_ORDER:
            raise ScheduleError(f"order is {self.order}, expected 0, 1 or 2")
        legend_of(self.rows)
        if self.order == 0 and any(Action.FORECAST in row for row in self.rows):
            raise ScheduleError("FORECAST needs order 1 or 2; with order 0 the action is REUSE")
        if not 0 <= self.period <= len(self.rows):
            raise ScheduleError(f"period is {self.period}, but there are {len(self.rows)} rows")
        if self.timesteps and (len(self.timesteps) != len(self.rows) or self.period):
            raise ScheduleError("timesteps: one a row is needed, and a schedule that repeats can't have them")
        if not all(map(math.isfinite, self.timesteps)) or not one_way(self.timesteps):
            raise ScheduleError(
                "timesteps must be finite, and only fall or only rise from row to row. Leave them out where a solver "
                "visits one twice: rows then go by the number of the call"
            )
        if self.adaptive is not None:
            self._check_adaptive(self.adaptive)
        if self.granularity:
            try:
                Granularity.parse(self.granularity)
            except OptionError as error:
                raise ScheduleError(f"schedule: {error}") from None

    def _check_adaptive(self, adaptive: Adaptive) -> None:
        if len(adaptive.thresholds) != len(self.rows) - 1:
            raise ScheduleError(
                f"adaptive: {len(adaptive.thresholds)} thresholds for {len(self.rows)} rows, one less is needed"
            )
        if len(set(self.rows)) != len(self.rows) or self.timesteps or self.period:
            raise ScheduleError("adaptive: its rows are different ones, without timesteps and period")

    # -- makers ---------------------------------------------------------------------------------------------------

    @classmethod
    def uniform(cls, interval: int, warmup: int = 1, order: int = 1) -> Schedule:
        """Compute the first `warmup` steps, then every `interval`-th; between them reuse (order 0) or forecast.

        Open-ended: it fits any graph and any number of steps. `uniform(3)` computes steps 0, 3, 6, ...
        """
        if interval < 1 or warmup < 1:
            raise ScheduleError(f"uniform needs interval >= 1 and warmup >= 1, got {interval} and {warmup}")
        between = (Action.FORECAST if order else Action.REUSE,)
        rows = ((Action.COMPUTE,),) * warmup + (between,) * (interval - 1) + ((Action.COMPUTE,),)
        name = f"uniform:{interval}" + (f":warmup={warmup}" if warmup != 1 else "")
        return cls(rows, order=order if interval > 1 else 0, period=interval, made_by=f"{name}, order {order}")

    @classmethod
    def full(cls) -> Schedule:
        """Compute everything at every step: exact."""
        return cls(((Action.COMPUTE,),), order=0, period=1, made_by="full")

    @classmethod
    def watching(cls, threshold: float, order: int = 1, **bounds: Any) -> Schedule:
        """Compute in full where the drift since the last full step reaches `threshold`; else reuse (order 0) or
        forecast. `bounds`: the other attributes of `Adaptive`."""
        between = Action.FORECAST if order else Action.REUSE
        rows: tuple[Row, ...] = ((Action.COMPUTE,), (between,))
        return cls(rows, order=order, adaptive=Adaptive((threshold,), **bounds), made_by=f"adaptive:{threshold:g}")

    @classmethod
    def parse(cls, text: str, order: int = 1) -> Schedule:
        """Read a short form (`full`, `uniform:3`, `uniform:3:warmup=2`, `adaptive:0.1`) or the path of a JSON file."""
        head, *rest = text.split(":")
        if head == "full" and not rest:
            return cls.full()
        if head == "uniform" and rest:
            named = dict(part.partition("=")[::2] for part in rest[1:])
            if rest[0].isdecimal() and set(named) <= {"warmup"} and all(value.isdecimal() for value in named.values()):
                return cls.uniform(int(rest[0]), warmup=int(named.get("warmup", 1)), order=order)
        elif head == "adaptive" and len(rest) == 1 and re.fullmatch(r"\d*\.?\d+", rest[0]):
            return cls.watching(float(rest[0]), order)
        elif text.endswith(".json"):
            return cls.load(text)
        raise ScheduleError(
            f"schedule {text!r} is not understood; use 'full', 'uniform:3', 'uniform:3:warmup=2', 'adaptive:0.1' or "
            "a path to a .json"
        )

    # -- reading --------------------------------------------------------------------------------------------------

    def row_index(self, step: int, timestep: float | None = None) -> int | None:
        """The row for `step` (from 0): by the nearest recorded timestep, else by counting. None past the end."""
        if self.timesteps and timestep is not None:
            return self.timeline.nearest(timestep)
        if step < len(self.rows):
            return step
        if not self.period:
            return None
        return len(self.rows) - self.period + (step - len(self.rows)) % self.period

    @functools.cached_property
    def timeline(self) -> Timeline:
        """The rows by their recorded timesteps, for calls that come at others."""
        return Timeline(self.rows, self.timesteps)

    def depth(self, column: int) -> int:
        """How many values of a region must be kept: 0 none, 1 its output, 2 and 3 also the ones computed before."""
        actions = {row[column] for row in self.rows}
        if Action.FORECAST in actions or self.partials(column):
            return 1 + self.order
        return 1 if Action.REUSE in actions else 0

    def partials(self, column: int) -> tuple[Partial, ...]:
        """The kinds of PARTIAL that a region meets; where there are any, its tokens age each for itself."""
        acts = dict.fromkeys(row[column] for row in self.rows)
        return tuple(act for act in acts if isinstance(act, Partial))

    def distinct_rows(self) -> tuple[Row, ...]:
        """The rows without repeats, in order of first use: one program (variant) each."""
        return tuple(dict.fromkeys(self.rows))

    def bind(self, keys: Sequence[str], fingerprint: str, granularity: str = "") -> Schedule:
        """Fit to a graph with these region keys: checks them, or spreads a one-column schedule over all regions.

        Raises:
            ScheduleError: the schedule was made for another granularity, or for another graph; says which regions
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

    # -- JSON and text --------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Versioned JSON; `from_json(s.to_json()) == s`."""
        legend = legend_of(self.rows)
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "made_by": self.made_by,
                "order": self.order,
                "period": self.period,
                "fingerprint": self.fingerprint,
                "granularity": self.granularity,
                "regions": None if self.regions is None else list(self.regions),
                "timesteps": list(self.timesteps),
                "predicted": dict(self.predicted),
                "control": self.control.to_dict(),
                "adaptive": None if self.adaptive is None else self.adaptive.to_dict(),
                "partials": {letter: one.to_list() for letter, one in legend.items()},
                "rows": [written(row, legend) for row in self.rows],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read `to_json`'s text.

        Raises:
            ScheduleError: not a schedule, a newer version, a missing or malformed entry.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != FORMAT:
                raise ScheduleError(f"not a schedule: format is {data['format']!r}, expected {FORMAT!r}")
            if data["version"] > VERSION:
                raise ScheduleError(f"schedule version {data['version']} is newer than this package reads ({VERSION})")
            legend = {letter: Partial(*pair) for letter, pair in data.get("partials", {}).items()}
            return cls(
                rows=tuple(read(row, legend) for row in data["rows"]),
                regions=_keys(data["regions"]),
                order=int(data["order"]),
                period=int(data["period"]),
                fingerprint=str(data["fingerprint"]),
                granularity=str(data.get("granularity", "")),
                timesteps=tuple(float(t) for t in data["timesteps"]),
                control=Control.from_dict(data.get("control", {})),
                adaptive=None if data.get("adaptive") is None else Adaptive.from_dict(data["adaptive"]),
                made_by=str(data["made_by"]),
                predicted={str(k): float(v) for k, v in data["predicted"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ScheduleError(f"not a readable schedule: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write `to_json` to `path`."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read the JSON at `path`."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it isn't text"
            raise ScheduleError(f"schedule file {str(path)!r} can't be read: {reason}") from error
        return cls.from_json(text)

    def __str__(self) -> str:
        """A grid: one line a region, one mark a step."""
        names = ("every region",) if self.regions is None else self.regions
        legend = legend_of(self.rows)
        glyphs = _GLYPH | {one: letter for letter, one in legend.items()}
        wide = max((len(name) for name in names), default=0)
        tail = f", then the last {self.period} repeat" if self.period else ""
        lines = [f"{self.made_by or 'schedule'}: {len(names)} x {len(self.rows)} steps{tail}"]
        for column, name in enumerate(names):
            lines.append(f"{name:<{wide}}  " + "".join(glyphs[row[column]] for row in self.rows))
        kinds = "".join(f"   {letter} {one}" for letter, one in legend.items())
        return "\n".join([*lines, f"# compute   = reuse   / forecast{kinds}"])


def _keys(regions: object) -> tuple[str, ...] | None:
    """The region keys of a schedule's JSON: null, or a list of texts."""
    if regions is None:
        return None
    if not isinstance(regions, list) or not all(isinstance(key, str) for key in regions):
        raise ValueError(f"regions is {regions!r}, expected a list of keys or null")
    return tuple(regions)
