"""A schedule as a table of facts and a grid of steps, and what differs between two: data first, rich tables second."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moeca_compile.inspect.actions import legend
from moeca_compile.inspect.html.measured import TRIED, tried
from moeca_compile.schedule import Act, Action, Partial, Schedule
from moeca_compile.schedule.action import legend_of, name_of
from moeca_compile.schedule.output import OutputFacts

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

EVERY = "every region"
MOST_TRIED = 3  # families of schedules that the table of facts lists, the best first
_STYLES: dict[Act, str] = {Action.COMPUTE: "bold", Action.REUSE: "dim", Action.FORECAST: "cyan"}
_GLYPHS: dict[Act, str] = {Action.COMPUTE: "█", Action.REUSE: "░", Action.FORECAST: "▒"}
_DESCRIBED = (
    "made_by", "order", "period", "fingerprint", "granularity", "timesteps", "searched_timesteps", "latent", "regions",
)  # fmt: skip


def facts(schedule: Schedule) -> dict[str, Any]:
    """What a schedule says of itself, JSON-able: sizes, order, variants, how many cells do what, predictions."""
    cells = [action for row in schedule.rows for action in row]
    weights = OutputFacts.of(schedule.output, schedule.rows)
    return {
        "made_by": schedule.made_by,
        "steps": len(schedule.rows),
        "period": schedule.period,
        "regions": None if schedule.regions is None else len(schedule.regions),
        "order": schedule.order,
        "variants": len(schedule.distinct_rows()),
        "computed": round(cells.count(Action.COMPUTE) / len(cells), 4),
        "forecast": round(cells.count(Action.FORECAST) / len(cells), 4),
        "reused": round(cells.count(Action.REUSE) / len(cells), 4),
        "partial": round(sum(isinstance(cell, Partial) for cell in cells) / len(cells), 4),
        "timesteps": [schedule.timesteps[0], schedule.timesteps[-1]] if schedule.timesteps else None,
        "searched_timesteps": schedule.searched_timesteps or None,
        "latent": list(schedule.latent) or None,
        "fingerprint": schedule.fingerprint,
        "granularity": schedule.granularity,
        "output_weights": None if weights is None else asdict(weights),
        "fitted_weights": None if schedule.fitted is None else str(schedule.fitted),
        "predicted": dict(schedule.predicted),
    }


def parts(schedule: Schedule) -> tuple[RenderableType, ...]:
    """What is printed of a schedule: its grid, an empty line, and its facts."""
    return grid(schedule), "", table_of_facts(schedule)


def table_of_facts(schedule: Schedule) -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts(schedule).items():
        if name == "predicted":
            best = tried(schedule)
            for inner, number in value.items():
                if not inner.startswith(TRIED):
                    table.add_row(f"predicted {inner}", f"{number:.4g}")
            for family in best[:MOST_TRIED]:
                table.add_row(f"predicted {TRIED}{family['name']}", f"{family['psnr_db']:.4g}")
            if len(best) > MOST_TRIED:
                table.add_row("", f"and {len(best) - MOST_TRIED} more were tried: --json lists all")
        elif name == "output_weights" and value is not None:
            table.add_row(*str(OutputFacts(**value)).split(": ", 1))
        elif value not in (None, "", []):
            table.add_row(name.replace("_", " "), str(value))
    return table


def grid(schedule: Schedule) -> Group:
    """Steps from left to right; regions that do the same at every step share a line."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("regions", no_wrap=True)
    table.add_column("steps")
    glyphs = _GLYPHS | {act: letter for letter, act in legend_of(schedule.rows).items()}
    for names, acts in _lines(schedule):
        cells = ((glyphs[act], _STYLES.get(act, "green")) for act in acts)
        table.add_row(_named(names), Text.assemble(*cells))
    tail = f"   the last {schedule.period} steps repeat" if schedule.period else ""
    return Group(table, Text("   ".join(f"{glyph} {legend(act)}" for act, glyph in glyphs.items()) + tail))


def _lines(schedule: Schedule) -> Iterator[tuple[list[str], tuple[Act, ...]]]:
    names = schedule.regions or (EVERY,)
    columns: dict[tuple[Act, ...], list[str]] = {}
    for name, actions in zip(names, zip(*schedule.rows, strict=True), strict=True):
        columns.setdefault(actions, []).append(name)
    for actions, alike in columns.items():
        yield alike, actions


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@dataclass(frozen=True)
class Difference:
    """What differs: `facts` are (name, left, right); `cells` are (step, region, left, right), absent ones None."""

    facts: tuple[tuple[str, Any, Any], ...]
    cells: tuple[tuple[int, str, str | None, str | None], ...]

    def __bool__(self) -> bool:
        return bool(self.facts or self.cells)

    def to_json(self) -> dict[str, Any]:
        return {"facts": [list(fact) for fact in self.facts], "cells": [list(cell) for cell in self.cells]}


def difference(left: Schedule, right: Schedule) -> Difference:
    """Compare two schedules by content: settings, regions, and what each region does at each step."""
    named = [(name, getattr(left, name), getattr(right, name)) for name in _DESCRIBED]
    a, b = _cells(left), _cells(right)
    changed = [
        (step, region, a.get((step, region)), b.get((step, region)))
        for step, region in dict.fromkeys((*a, *b))
        if a.get((step, region)) != b.get((step, region))
    ]
    return Difference(
        tuple(entry for entry in named if entry[1] != entry[2]), tuple(sorted(changed, key=lambda cell: cell[0]))
    )


def _cells(schedule: Schedule) -> dict[tuple[int, str], str]:
    names = schedule.regions or (EVERY,)
    return {
        (step, name): name_of(action)
        for step, row in enumerate(schedule.rows)
        for name, action in zip(names, row, strict=True)
    }


def table_of_differences(differences: Difference, left: str, right: str) -> Table:
    """`left` and `right` are the names of the two schedules."""
    from rich.table import Table

    table = Table("what", left, right, box=None, padding=(0, 2, 0, 0))
    for name, a, b in differences.facts:
        table.add_row(name.replace("_", " "), _short(a), _short(b))
    for (step, a_b), cells in itertools.groupby(differences.cells, key=lambda cell: (cell[0], cell[2:])):
        table.add_row(f"step {step}, {_named([cell[1] for cell in cells])}", *(action or "absent" for action in a_b))
    return table


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
