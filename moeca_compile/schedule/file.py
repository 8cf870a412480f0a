"""The entries of a schedule's JSON file, to and from a schedule's attributes. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.action import format_row, legend_from, legend_of, parse_row
from moeca_compile.schedule.adaptive import Adaptive
from moeca_compile.schedule.control import Control
from moeca_compile.schedule.decode import Entries, is_positive, short
from moeca_compile.schedule.fitted import FittedWeights
from moeca_compile.schedule.output import OutputRule

if TYPE_CHECKING:
    from moeca_compile.schedule import Schedule

FORMAT, VERSION = "moeca-schedule", 6
# versions of files with the sampler's own timesteps, where nothing is handed over, without the latent's shape, and
# without fitted weights too
OWN_TIMESTEPS, NOT_HANDED_OVER, WITHOUT_LATENT, PLAIN = 5, 4, 3, 2
FRONT_FORMAT = "moeca-front"  # of a file with several schedules
_OPTIONAL: dict[str, Callable[[Entries], Any]] = {
    "adaptive": Adaptive.from_entries,
    "output": OutputRule.from_entries,
    "fitted": FittedWeights.from_entries,
}
_FLAGS = ("searched_timesteps", "hand_over")  # left out where they are false
_ENTRIES = (
    "format", "version", "made_by", "order", "period", "fingerprint", "granularity", "regions", "timesteps",
    "searched_timesteps", "predicted", "control", "partials", "rows", "latent", "hand_over", *_OPTIONAL,
)  # fmt: skip


def entries_of(schedule: Schedule) -> dict[str, Any]:
    """What the file of a schedule holds; `attributes_from` reads it."""
    legend = legend_of(schedule.rows)
    fitted = {"output": schedule.output, "fitted": schedule.fitted}
    weights = {name: value.to_dict() for name, value in fitted.items() if value is not None}
    return {
        "format": FORMAT,
        "version": _version(schedule, bool(weights)),
        "made_by": schedule.made_by,
        "order": schedule.order,
        "period": schedule.period,
        "fingerprint": schedule.fingerprint,
        "granularity": schedule.granularity,
        "regions": None if schedule.regions is None else list(schedule.regions),
        "timesteps": list(schedule.timesteps),
        "predicted": dict(schedule.predicted),
        "control": schedule.control.to_dict(),
        "adaptive": None if schedule.adaptive is None else schedule.adaptive.to_dict(),
        "partials": {letter: partial.to_list() for letter, partial in legend.items()},
        "rows": [format_row(row, legend) for row in schedule.rows],
        **({"latent": list(schedule.latent)} if schedule.latent else {}),
        **{name: True for name in _FLAGS if getattr(schedule, name)},
        **weights,
    }


def _version(schedule: Schedule, has_weights: bool) -> int:
    """The oldest version that has what this schedule needs."""
    if schedule.searched_timesteps:
        return VERSION
    if schedule.hand_over:
        return OWN_TIMESTEPS
    return NOT_HANDED_OVER if schedule.latent else WITHOUT_LATENT if has_weights else PLAIN


def attributes_from(data: Entries) -> dict[str, Any]:
    """The arguments of `Schedule` that a file's entries say.

    Raises:
        ScheduleError: not a schedule, a newer version, a missing or malformed entry.
    """
    if data.text("format") == FRONT_FORMAT:
        raise ScheduleError("it is a front of several schedules: name one by a budget, as in 'front.json@macs:0.34'")
    if data.text("format") != FORMAT:
        raise ScheduleError(f"format is {short(data.text('format'))}, expected {FORMAT!r}")
    version = data.integer("version")
    if not 1 <= version <= VERSION:
        newer = f"newer than this package reads ({VERSION})" if version > VERSION else "no version there was"
        raise ScheduleError(f"version {short(version)} is {newer}")
    data.reject_unknown(_ENTRIES)
    partials, predicted = data.entries("partials", {}), data.entries("predicted")
    legend = legend_from({letter: partials.get(letter) for letter in partials.data})
    present = {name: read for name, read in _OPTIONAL.items() if data.get(name, None) is not None}
    return {
        "rows": tuple(parse_row(row, legend) for row in data.texts("rows")),
        "regions": None if data.get("regions") is None else data.texts("regions"),
        "order": data.integer("order"),
        "period": data.integer("period"),
        "fingerprint": data.text("fingerprint"),
        "granularity": data.text("granularity", ""),
        "timesteps": data.numbers("timesteps"),
        "latent": _sizes(data.get("latent", [])),
        **{name: _flag(name, data.get(name, False)) for name in _FLAGS},
        "control": Control.from_entries(data.entries("control", {})),
        "made_by": data.text("made_by"),
        "predicted": {name: predicted.number(name) for name in predicted.data},
        **{name: read(data.entries(name)) for name, read in present.items()},
    }


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ScheduleError(f"{name} is {short(value)}, expected true or false")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(map(is_positive, value)):
        raise ScheduleError(f"latent is {short(value)}, expected a list of sizes")
    return tuple(value)
