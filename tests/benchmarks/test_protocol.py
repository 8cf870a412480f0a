"""The measuring protocol itself: order, warm-up, ratios, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.protocol import Timing, as_json, interleave, print_table, save


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    before = {"b": lambda: calls.append("before b")}
    timings = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1, before=before
    )
    assert calls == ["a", "before b", "b"] * 3
    assert {name: len(timing.ms) for name, timing in timings.items()} == {"a": 2, "b": 2}


def test_a_ratio_pairs_the_rounds() -> None:
    """A slow spell that hits both contenders of a round leaves the ratio alone."""
    assert Timing((1.0, 10.0, 1.5)).speedup(Timing((2.0, 20.0, 3.0))) == pytest.approx(2.0)


def test_table_and_json_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timings = {"slow": Timing((4.0, 5.0, 6.0)), "fast": Timing((2.0, 2.5, 3.0))}
    print_table("one step", timings, baseline="slow")
    assert "2.000" in capsys.readouterr().out
    written = json.loads(save("one", {"timings": as_json(timings, baseline="slow")}, tmp_path).read_text())
    assert written["timings"]["fast"] == {"median_ms": 2.5, "min_ms": 2.0, "max_ms": 3.0, "rounds": 3, "speedup": 2.0}
    assert written["machine"]["packages"]["torch"]
    assert written["machine"]["torch_threads"] == 1
