"""A schedule as text: one line a region, one mark a step."""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.schedule.action import Act, Action, Row, legend_of

_MARKS: dict[Act, str] = {Action.COMPUTE: "#", Action.REUSE: "=", Action.FORECAST: "/"}


def grid(title: str, regions: Sequence[str], rows: Sequence[Row]) -> str:
    """The rows as columns of marks under a title, and below them what the marks mean."""
    legend = legend_of(rows)
    marks = _MARKS | {action: letter for letter, action in legend.items()}
    width = max((len(name) for name in regions), default=0)
    lines = [f"{name:<{width}}  " + "".join(marks[row[i]] for row in rows) for i, name in enumerate(regions)]
    kinds = "".join(f"   {letter} {action}" for letter, action in legend.items())
    return "\n".join([title, *lines, f"# compute   = reuse   / forecast{kinds}"])
