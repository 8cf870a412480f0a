"""What `moeca drift` finds by sampling, as tables for the terminal: regions, MoE layers, experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Regions = Mapping[str, Mapping[str, Any]]

# column -> quantity
_WHOLE = {"reuse": "reuse", "forecast": "forecast", "worst 10 %": "worst 10%", "worst 25 %": "worst 25%"}
_BRANCHES = {"transitions": "transitions", "routing L1": "routing", "drift": "branches", "ICC": "within a token"}
_SUMS = {
    "forecast": "sum forecast",
    "by branch": "branch forecast",
    "tokens changed": "tokens with transitions",
    "their error": "at transitions",
    "worst 10 %": "branch worst 10%",
}
_SHARES = {"worst 10%", "worst 25%", "transitions", "tokens with transitions", "at transitions", "branch worst 10%"}


def tables(regions: Regions) -> list[Table]:
    """Every region's output; then, of MoE layers whose branches were told apart, branches, routed sums and experts."""
    layers = routed(regions)
    drawn = [_table("region", _WHOLE, regions)]
    if layers:
        drawn += [_table("branches of", _BRANCHES, layers), _table("routed sum of", _SUMS, layers), _experts(layers)]
    return drawn


def not_told_apart(regions: Regions) -> list[str]:
    """MoE layers that were looked at as a whole only."""
    return [key for key, region in regions.items() if region["kind"] == "experts" and "by_expert" not in region]


def routed(regions: Regions) -> dict[str, Mapping[str, Any]]:
    """The regions whose branches were told apart."""
    return {key: region for key, region in regions.items() if "by_expert" in region}


def _experts(layers: Regions) -> Table:
    """How unlike the experts of a layer are, and what the choice of one says about the step and the position."""
    table = _empty("experts of", "load", "transitions", "drift", "bits by step", "by position")
    for key, layer in layers.items():
        spread = (_range(layer["by_expert"].get(what, ())) for what in ("load", "transitions", "branches"))
        bits = (f"{layer['overall'][what]:.3f}" for what in ("expert by step", "expert by position"))
        table.add_row(key, *spread, *bits)
    return table


def _table(title: str, columns: Mapping[str, str], regions: Regions) -> Table:
    table = _empty(title, *columns)
    for key, region in regions.items():
        table.add_row(key, *(_cell(what, region["overall"].get(what, math.nan)) for what in columns.values()))
    return table


def _empty(*columns: str) -> Table:
    from rich.table import Table

    return Table(*columns, box=None, padding=(0, 2, 0, 0))


def _cell(what: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.1%}" if what in _SHARES else f"{value:.3f}"


def _range(values: Sequence[float]) -> str:
    measured = [value for value in values if not math.isnan(value)]
    return f"{min(measured):.3f}-{max(measured):.3f}" if measured else "-"
