"""Ways of leaving branches out of a schedule by branches, and which of them are taken."""

from __future__ import annotations

import pytest

from moeca_compile.graph.regions import Cut, Region, RegionMap
from moeca_compile.planner.refine.thin import UNTOUCHED, thin, ways_of
from moeca_compile.schedule import Action, Partial, Schedule
from moeca_compile.schedule.action import format_row, legend_of

C, F, P = Action.COMPUTE, Action.FORECAST, Partial(0, 0.1)


def regions(layers: int) -> RegionMap:
    columns = [(layer, kind) for layer in range(layers) for kind in ("attention", "experts")]
    return RegionMap(
        tuple(
            Region(f"blocks.{layer}.{kind}", kind, layer, (Cut("y", (1, 4, 2), "float32", "cpu"),), ("y",))
            for layer, kind in columns
        )
    )


def schedule(layers: int) -> Schedule:
    full, cheap = (C, C) * layers, (F, P) * layers
    keys = tuple(one.key for one in regions(layers))
    return Schedule((full, full, cheap, cheap, cheap, full, cheap), keys)


def texts(one: Schedule) -> list[str]:
    return [format_row(row, legend_of(one.rows)) for row in one.rows]


@pytest.mark.parametrize(
    ("way", "rows"),
    [
        ("first third of the layers as whole regions", "CCCCCC CCCCCC FFFaFa FFFaFa FFFaFa CCCCCC FFFaFa"),
        ("middle third of the layers as whole regions", "CCCCCC CCCCCC FaFFFa FaFFFa FaFFFa CCCCCC FaFFFa"),
        ("last third of the layers as whole regions", "CCCCCC CCCCCC FaFaFF FaFaFF FaFaFF CCCCCC FaFaFF"),
        ("branches in the first cheap step of each run", "CCCCCC CCCCCC FaFaFa FFFFFF FFFFFF CCCCCC FaFaFa"),
        ("branches in the last cheap step of each run", "CCCCCC CCCCCC FFFFFF FFFFFF FaFaFa CCCCCC FaFaFa"),
        ("branches in every second cheap step", "CCCCCC CCCCCC FFFFFF FaFaFa FFFFFF CCCCCC FFFFFF"),
    ],
)
def test_each_way(way: str, rows: str) -> None:
    assert texts(ways_of(regions(3))[way](schedule(3))) == rows.split()


def test_one_layer_has_no_thirds() -> None:
    assert not [name for name in ways_of(regions(1)) if "third" in name]


def test_ways_are_taken_one_on_top_of_the_other_where_they_are_better() -> None:
    """Errors that count branches in the first and last layers: those of the middle one hurt most."""
    rolled: list[int] = []

    def rollout(one: Schedule, seed: int) -> list[float]:
        rolled.append(seed)
        return [sum({1: 1e-3, 3: 1e-2, 5: -1e-4}[c] for row in one.rows for c in (1, 3, 5) if row[c] == P) + 0.1]

    found = thin(schedule(3), ways_of(regions(3)), rollout, range(6), raced=2, data_range=2.0)
    first, middle, *steps = ways_of(regions(3))
    assert found.ways == (first, middle)
    assert texts(found.schedule)[2:5] == ["FFFFFa"] * 3
    assert list(found.tried) == [UNTOUCHED, first, middle, *steps]
    assert {3, 4, 5} <= set(rolled), "the last word is said on all seeds"
    assert rolled.count(5) == 2, "with it and without"


def test_what_is_better_on_the_raced_seeds_alone_is_not_taken() -> None:
    def rollout(one: Schedule, seed: int) -> list[float]:
        branches = sum(act == P for row in one.rows for act in row)
        return [1.0 + branches] if seed < 2 else [1 / (1.0 + branches) ** 2]

    found = thin(schedule(3), ways_of(regions(3)), rollout, range(6), raced=2, data_range=2.0)
    assert found.ways == ()
    assert found.schedule == schedule(3)


def test_where_branches_are_worth_it_nothing_is_left_out() -> None:
    def rollout(one: Schedule, seed: int) -> list[float]:
        return [1.0 / (1 + sum(act == P for row in one.rows for act in row))]

    found = thin(schedule(3), ways_of(regions(3)), rollout, range(2), raced=2, data_range=2.0)
    assert found.ways == ()
    assert found.schedule == schedule(3)
    assert len(found.tried) == 7
