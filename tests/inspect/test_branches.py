"""Branch drift as tables and pictures: what is in them, and what is said where there is nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from moeca_compile.errors import UserError
from moeca_compile.inspect.drift import plots as branch_plots
from moeca_compile.inspect.drift import tables as branches

NAN = math.nan
WHOLE = {"reuse": 0.125, "forecast": 0.0625, "worst 10%": 0.25, "worst 25%": 0.5}
BRANCHES = {
    "transitions": 0.02, "routing": 0.05, "branches": 0.125, "within a token": 0.4, "sum forecast": 0.3,
    "branch forecast": 0.1, "at transitions": 0.9, "tokens with transitions": 0.08, "branch worst 10%": 0.35,
    "expert by step": 0.1, "expert by position": 0.75,
}  # fmt: skip


def region(kind: str, layer: int, overall: dict[str, float]) -> dict[str, Any]:
    steps = {what: [NAN, value, 2 * value] for what, value in overall.items() if not what.startswith("expert")}
    one: dict[str, Any] = {"kind": kind, "layer": layer, "overall": overall, "by_step": steps}
    one["by_position"] = {"reuse": [0.1, 0.2, 0.3, 0.4]}
    if "transitions" in overall:
        one["by_position"]["load"] = [[0.25, 0.0, 0.0, 0.25], [0.0, 0.25, 0.25, 0.0]]
        two = [[NAN, 0.1, 0.2], [NAN, 0.3, 0.4]]
        one["by_expert"] = {
            "load": [0.5, 0.5], "load by step": [[0.4, 0.5, 0.6], [0.6, 0.5, 0.4]], "transitions": [0.01, 0.03],
            "transitions by step": two, "branches": [0.1, NAN], "branches by step": two,
        }  # fmt: skip
    return one


FOUND: dict[str, Any] = {
    "steps": 3,
    "regions": {
        "a.0": region("attention", 0, WHOLE),
        "m.0": region("experts", 0, {**WHOLE, **BRANCHES}),
        "m.1": region("experts", 1, WHOLE),
    },
}


def cells(table: Any) -> dict[str, list[str]]:
    keys, *columns = ([str(cell) for cell in column.cells] for column in table.columns)
    return {key: [column[row] for column in columns] for row, key in enumerate(keys)}


def test_a_table_of_regions_and_three_of_branches() -> None:
    regions, apart, sums, experts = map(cells, branches.tables(FOUND["regions"]))
    assert set(regions) == {"a.0", "m.0", "m.1"}
    assert regions["a.0"] == ["0.125", "0.062", "25.0%", "50.0%"]
    assert apart == {"m.0": ["2.0%", "0.050", "0.125", "0.400"]}
    assert sums == {"m.0": ["0.300", "0.100", "8.0%", "90.0%", "35.0%"]}
    assert experts == {"m.0": ["0.500-0.500", "0.010-0.030", "0.100-0.100", "0.100", "0.750"]}
    assert branches.not_told_apart(FOUND["regions"]) == ["m.1"]


def test_without_experts_there_is_one_table() -> None:
    (only,) = branches.tables({"a.0": region("attention", 0, {"reuse": 0.1})})
    assert cells(only) == {"a.0": ["0.100", "-", "-", "-"]}


def test_layers_are_drawn_by_step_and_by_position() -> None:
    figure = branch_plots.by_layer(FOUND, "a title")
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert len(panels) == 10
    drift = panels["MoE output: drift, relative"]
    assert drift.images[0].get_array().shape == (2, 3)
    assert [label.get_text() for label in drift.get_yticklabels()] == ["0", "1"]
    assert panels["branches that change their expert"].images[0].get_array().shape == (1, 3)
    assert panels["attention: drift by position"].images[0].get_array().shape == (1, 4)
    limits = {panels[f"{name}: drift, relative"].images[0].get_clim() for name in ("attention", "persisting branches")}
    assert limits == {(0.125, 0.25)}, "drifts share one scale"


def test_experts_are_drawn_by_layer() -> None:
    figure = branch_plots.by_expert(FOUND)
    images = [axes.images[0].get_array().shape for axes in figure.axes if axes.images]
    assert images == [(2, 3), (2, 3), (2, 4)]


def test_nothing_to_draw_is_said() -> None:
    plain = copy.deepcopy(FOUND)
    del plain["regions"]["m.0"]
    with pytest.raises(UserError, match="no layer whose branches can be told apart"):
        branch_plots.by_expert(plain)
    with pytest.raises(UserError, match="neither attention nor experts"):
        branch_plots.by_layer({"regions": {}})
