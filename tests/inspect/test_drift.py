"""Measured drift as lines: of steps, of groups of regions, of experts."""

from __future__ import annotations

import math

import numpy as np

from moeca_compile.inspect.drift import lines as drift

PAIRS = {(0, 1): 0, (1, 2): 1, (0, 2): 2}
PARTS = np.array([[[[3.0, 0.0]], [[0.0, 0.0]], [[6.0, 0.0]]], [[[0.0, 4.0]], [[0.0, 1.0]], [[0.0, 8.0]]]])


def test_a_line_for_each_gap_and_each_group() -> None:
    lines = drift.by_step(3, PAIRS, PARTS, ["attention", "others"])
    assert set(lines) == {"all regions, 1 old", "all regions, 2 old", "attention, 1 old", "others, 1 old"}
    assert lines["all regions, 1 old"][1:] == [5.0, 1.0]
    assert math.isnan(lines["all regions, 1 old"][0])
    assert lines["all regions, 2 old"][2] == 10.0
    assert lines["attention, 1 old"][1:] == [3.0, 0.0]


def test_samples_count_by_their_mean_square() -> None:
    parts = np.array([[[[3.0], [4.0]]]])
    assert drift.by_step(2, {(0, 1): 0}, parts, ["all"])["all regions, 1 old"][1] == np.sqrt(12.5)


def test_a_line_for_each_layer_and_a_column_for_each_expert() -> None:
    found = [{"region": f"blocks.{b}.moe", "expert": e, "forecast": b + e / 10} for b in range(2) for e in range(3)]
    assert drift.by_expert(found) == {"blocks.0.moe": [0.0, 0.1, 0.2], "blocks.1.moe": [1.0, 1.1, 1.2]}


def test_a_stale_expert_that_was_not_tried_is_unknown() -> None:
    found = [
        {"region": "blocks.0.moe", "expert": expert, "psnr_db": db} for expert, db in ((2, 50.0), (0, 40.0), (0, 42.0))
    ]
    (line,) = drift.by_harm(found).values()
    assert (line[0], line[2]) == (41.0, 50.0)
    assert math.isnan(line[1])
    assert drift.by_harm([]) == {}
