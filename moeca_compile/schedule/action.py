"""Actions: what a step does with a region. Pure data."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.decode import short


class Action(enum.Enum):
    """What a step does with a whole region."""

    COMPUTE = "C"  # run the region, and write its state
    REUSE = "R"  # copy the output of the last step that computed the region
    FORECAST = "F"  # extrapolate the kept outputs with the schedule's order

    __hash__ = (
        object.__hash__
    )  # members equal only themselves; Enum's own hash runs in Python and is slow for long rows


@dataclass(frozen=True, slots=True)
class Partial:
    """Recompute a part of a region and forecast the rest.

    Attributes:
        rho: fraction of each sample's tokens that is recomputed, in [0, 1].
        tau: fraction of each sample's expert branches, (token, expert) pairs, that is computed beyond those tokens, in
            [0, 1]. Transitions (the cache does not hold the branch's expert) come first, then the branches with the
            highest drift.
        shared: compute the shared experts for all tokens, not only for the recomputed tokens.

    Raises:
        ScheduleError: a fraction outside [0, 1].
    """

    rho: float = 0.0
    tau: float = 0.0
    shared: bool = False

    def __post_init__(self) -> None:
        for name in ("rho", "tau"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ScheduleError(f"PARTIAL: {name} is {short(value)}, expected a fraction from 0 to 1")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.shared, bool):
            raise ScheduleError(f"PARTIAL: shared is {short(self.shared)}, expected true or false")

    def to_list(self) -> list[float | bool]:
        """Write the action as numbers, for JSON.

        Returns:
            rho, tau and, if set, shared; `Partial(*numbers)` is the same action.
        """
        return [self.rho, self.tau, *([True] if self.shared else [])]

    def tokens(self, of: int) -> int:
        """Count the tokens of a sample that are recomputed.

        Args:
            of: how many tokens a sample has.

        Returns:
            rho times that, rounded up.
        """
        return _share(self.rho, of)

    def branches(self, of: int) -> int:
        """Count the expert branches of a sample that are computed beyond those of recomputed tokens.

        Args:
            of: how many branches a sample has.

        Returns:
            tau times that, rounded up.
        """
        return _share(self.tau, of)

    def __str__(self) -> str:
        return f"PARTIAL({self.rho:g}, {self.tau:g}{', shared' if self.shared else ''})"


Act = Action | Partial
Row = tuple[Act, ...]
_LETTERS = {action.value: action for action in Action}
_NAMES = "abcdefghijklmnopqrstuvwxyz"


def name_of(act: Act) -> str:
    """`COMPUTE`, or `PARTIAL(0.1, 0.05)`."""
    return act.name if isinstance(act, Action) else str(act)


def legend_of(rows: Iterable[Row]) -> dict[str, Partial]:
    """A lowercase letter for each distinct PARTIAL action in `rows`, in order of first use.

    Raises:
        ScheduleError: there are more of them than letters.
    """
    kinds = dict.fromkeys(act for row in rows for act in row if isinstance(act, Partial))
    if len(kinds) > len(_NAMES):
        raise ScheduleError(f"{len(kinds)} kinds of PARTIAL in one schedule, at most {len(_NAMES)} can be written")
    return dict(zip(_NAMES, kinds, strict=False))


def legend_from(data: Mapping[str, object]) -> dict[str, Partial]:
    """Decode the legend of a schedule's JSON: lists as `Partial.to_list` returns them, by lowercase letter.

    Raises:
        ScheduleError: a name is not a lowercase letter, or a value is not a list of two or three entries.
    """
    for letter, fields in data.items():
        if len(letter) != 1 or letter not in _NAMES:
            raise ScheduleError(f"partials: {short(letter)} is no small letter")
        if not isinstance(fields, list) or not 2 <= len(fields) <= 3:
            raise ScheduleError(f"partials: {letter} is {short(fields)}, expected [rho, tau] or [rho, tau, shared]")
    return {letter: Partial(*fields) for letter, fields in data.items() if isinstance(fields, list)}


def format_row(row: Row, legend: Mapping[str, Partial]) -> str:
    """A row as text, one letter per region."""
    letters = {act: letter for letter, act in legend.items()}
    return "".join(letters[act] if isinstance(act, Partial) else act.value for act in row)


def parse_row(text: str, legend: Mapping[str, Partial]) -> Row:
    """Read the text that `format_row` wrote.

    Raises:
        ScheduleError: a letter is neither an action nor in the legend.
    """
    actions: dict[str, Act] = {**_LETTERS, **legend}
    unknown = [letter for letter in text if letter not in actions]
    if unknown:
        raise ScheduleError(f"row {short(text)}: {unknown[0]!r} is no action; known here: {', '.join(actions)}")
    return tuple(actions[letter] for letter in text)


def _share(fraction: float, of: int) -> int:
    """The fraction of `of`, rounded up; the tolerance keeps float error from adding one."""
    return min(of, math.ceil(fraction * of - 1e-9))
