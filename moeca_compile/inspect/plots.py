"""Pictures for matplotlib: a schedule's grid, a drift heat map, error against cost. PNG or SVG by the file's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeca_compile.errors import UserError
from moeca_compile.schedule import Act, Action, Schedule
from moeca_compile.schedule.action import legend_of, name_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS: dict[Act, str] = {Action.COMPUTE: "#1f3a5f", Action.FORECAST: "#8fb8de", Action.REUSE: "#e4e4e4"}
_GREENS = ("#2f7d4f", "#6fb58a", "#b4dcc2")  # kinds of PARTIAL, in turn
_FORMATS = (".png", ".svg")


def schedule_grid(schedule: Schedule, steps: int | None = None) -> Figure:
    """Steps from left to right, regions from top to bottom. `steps`: how many to draw of an open-ended schedule."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = schedule.regions or ("every region",)
    count = steps or len(schedule.rows)
    rows = [schedule.rows[i] if (i := schedule.row_index(step)) is not None else None for step in range(count)]
    acts = [*_COLORS, *legend_of(schedule.rows).values()]
    colors = {act: _COLORS.get(act, _GREENS[number % len(_GREENS)]) for number, act in enumerate(acts)}
    shown = [[acts.index(row[column]) if row else 0 for row in rows] for column in range(len(names))]
    figure, axes = _figure(max(5.0, 0.16 * count + 2.5), 0.22 * len(names) + 1.4)
    axes.imshow(shown, cmap=ListedColormap([colors[act] for act in acts]), vmin=0, vmax=len(acts) - 1, aspect="auto")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("step")
    axes.set_title(schedule.made_by or "schedule", fontsize=9)
    used = [act for number, act in enumerate(acts) if any(number in line for line in shown)]
    patches = [Patch(color=colors[act], label=name_of(act).lower()) for act in used]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False)
    return figure


def drift_map(drift: Mapping[str, Sequence[float]], title: str = "drift", columns: str = "step") -> Figure:
    """A heat map of one line a region or layer, one column a step or expert; log scale, for drifts span decades.

    drift: by name, how far the output at each step is from what a forecast would give, relative; nan where unknown.
    """
    from matplotlib.colors import LogNorm

    if not drift or not all(len(line) for line in drift.values()):
        raise UserError("drift_map: nothing to draw; give at least one line with at least one step")
    values = list(drift.values())
    positive = [v for line in values for v in line if v == v and v > 0]
    figure, axes = _figure(max(5.0, 0.14 * max(map(len, values)) + 3), 0.2 * len(values) + 1.4)
    norm = LogNorm(min(positive), max(positive)) if positive and min(positive) < max(positive) else None
    wide = max(map(len, values))
    padded = [[*line, *[float("nan")] * (wide - len(line))] for line in values]
    image = axes.imshow(padded, aspect="auto", norm=norm, cmap="magma")
    axes.set_yticks(range(len(drift)), list(drift), fontsize=7)
    axes.set_xlabel(columns)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label="relative drift")
    return figure


def pareto(
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    dots: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    title: str = "",
) -> Figure:
    """Error against cost: one line for each way of spending less, and dots that no line joins.

    series, dots: by name, points (cost, quality), such as (fraction of the MACs, PSNR in dB).
    """
    if not any(series.values()):
        raise UserError("pareto: nothing to draw; give at least one series with at least one point")
    figure, axes = _figure(6.0, 4.0)
    for (name, points), marker in zip(series.items(), "osD^vPX*<>hp" * len(series), strict=False):
        ordered = sorted(points)
        axes.plot([x for x, _ in ordered], [y for _, y in ordered], marker=marker, markersize=4, label=name)
    for (name, points), marker in zip((dots or {}).items(), "+x1234" * len(dots or {}), strict=False):
        axes.plot([x for x, _ in points], [y for _, y in points], marker, color="0.5", markersize=4, label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as .png or .svg.

    Raises:
        UserError: another ending.
    """
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise UserError(f"{target.name}: a picture is written as {' or '.join(_FORMATS)}")
    figure.savefig(target, dpi=150, bbox_inches="tight")
    return target


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """Without pyplot: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()
