"""Pictures of what `moeca drift` finds by sampling: heat maps of layers by step and position, and of experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moeca_compile.errors import UserError
from moeca_compile.inspect.drift.tables import Regions, routed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# title, of which regions, quantity
_STEPS = (
    ("attention: drift, relative", "attention", "reuse"),
    ("MoE output: drift, relative", "experts", "reuse"),
    ("persisting branches: drift, relative", "routed", "branches"),
    ("branches that change their expert", "routed", "transitions"),
    ("routed sum: forecast error, relative", "routed", "sum forecast"),
    ("the same, forecast by branch", "routed", "branch forecast"),
    ("attention: error in the worst 10 % of tokens", "attention", "worst 10%"),
    ("routed sum: error in tokens with transitions", "routed", "at transitions"),
)
_POSITIONS = (("attention: drift by position", "attention"), ("MoE output: drift by position", "experts"))
# Quantities that share a color scale, and which are on a logarithmic one: drifts span decades.
_SCALES = {
    "reuse": "drift", "branches": "drift", "sum forecast": "error", "branch forecast": "error",
    "worst 10%": "share", "at transitions": "share",
}  # fmt: skip
_LOGARITHMIC = ("drift", "error", "positions")


def by_layer(drift: Mapping[str, Any], title: str = "") -> Figure:
    """A panel for each quantity: layers from top to bottom, steps or positions from left to right."""
    regions = drift["regions"]
    panels = [(name, _SCALES.get(what, what), _lines(regions, kind, "by_step", what)) for name, kind, what in _STEPS]
    panels += [(name, "positions", _lines(regions, kind, "by_position", "reuse")) for name, kind in _POSITIONS]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        raise UserError("drift: nothing to draw; neither attention nor experts were found")
    rows = math.ceil(len(panels) / 2)
    figure, grid = _figure(rows, 2, (9.0, 0.5 + 1.45 * rows), title)
    drawn: dict[str, list[Sequence[float]]] = {}  # by color scale
    for _, scale, lines in panels:
        drawn.setdefault(scale, []).extend(lines.values())
    norms = {scale: _norm(lines, scale) for scale, lines in drawn.items()}
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, scale, lines) in zip(grid, panels, strict=False):
        _heat(figure, axes, list(lines.values()), name, norms[scale])
        axes.set_xlabel("position" if scale == "positions" else "step", fontsize=7)
        axes.set_ylabel("layer", fontsize=7)
        axes.set_yticks(range(len(lines)), [str(regions[key]["layer"]) for key in lines])
    return figure


def by_expert(drift: Mapping[str, Any], title: str = "") -> Figure:
    """A row for each MoE layer: of its experts the load and the drift by step, and the load by position."""
    layers = routed(drift["regions"])
    if not layers:
        raise UserError("drift: no layer whose branches can be told apart, so no experts to draw")
    names = ("load by step", "drift of persisting branches by step", "load by position")
    figure, grid = _figure(len(layers), 3, (10.0, 0.5 + 1.3 * len(layers)), title)
    drifts: list[Sequence[float]] = []
    for layer in layers.values():
        drifts += layer["by_expert"]["branches by step"]
    norm_of_drift = _norm(drifts, "drift")
    for row, layer in enumerate(layers.values()):
        each, last = layer["by_expert"], row == len(layers) - 1
        shown = (each["load by step"], each["branches by step"], layer["by_position"]["load"])
        for column, lines in enumerate(shown):
            axes = grid[3 * row + column]
            norm = norm_of_drift if column == 1 else _norm(lines, "load")
            _heat(figure, axes, lines, "" if row else names[column], norm)
            axes.set_xlabel("" if not last else "position" if column == 2 else "step", fontsize=7)
        grid[3 * row].set_ylabel(f"layer {layer['layer']}: expert", fontsize=7)
    return figure


def _lines(regions: Regions, kind: str, part: str, what: str) -> dict[str, Sequence[float]]:
    """Of the regions of a kind, or of those whose branches were told apart."""
    chosen = (
        routed(regions) if kind == "routed" else {k: region for k, region in regions.items() if region["kind"] == kind}
    )
    return {key: region[part][what] for key, region in chosen.items() if what in region[part]}


def _norm(lines: Iterable[Sequence[float]], scale: str) -> Any:
    """One color scale for all these lines; logarithmic ones leave zeros out."""
    from matplotlib.colors import LogNorm, Normalize

    logarithmic = scale in _LOGARITHMIC
    known = [value for line in lines for value in line if value == value and (value > 0 or not logarithmic)]
    if not known or min(known) == max(known):
        return None
    return (LogNorm if logarithmic else Normalize)(min(known), max(known))


def _heat(figure: Figure, axes: Any, lines: Sequence[Sequence[float]], title: str, norm: Any) -> None:
    image = axes.imshow(lines, aspect="auto", cmap="magma", norm=norm, interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=6)
    figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=6, which="both")


def _figure(rows: int, columns: int, size: tuple[float, float], title: str) -> tuple[Figure, list[Any]]:
    """With one axes a panel; without pyplot: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=9)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
