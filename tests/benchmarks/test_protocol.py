"""The measuring protocol itself: order, warm-up, ratios, what is written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.protocol import Timing, _program, _words, as_json, in_step, interleave, print_table, save


@pytest.mark.slow
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


def test_walks_take_turns_step_by_step_and_a_time_is_the_sum_of_its_steps() -> None:
    order: list[str] = []

    def walk(name: str, steps: int, seconds: float) -> Iterator[int]:
        for step in range(steps):
            time.sleep(seconds)
            order.append(name)
            yield step

    walks = {"a": lambda: walk("a", 3, 0.002), "b": lambda: walk("b", 5, 0.004)}
    timings = in_step(walks, rounds=2)
    assert "".join(order) == "ababab" + "bb" + "ababab" + "bb"
    assert all(len(one.ms) == 2 for one in timings.values())
    assert min(timings["a"].ms) >= 6
    assert min(timings["b"].ms) >= 20


def test_a_program_in_a_folder_is_told_by_its_whole_name() -> None:
    root = Path("somewhere/benchmarks")
    assert _program(root / "steps.py") == "steps"
    assert _program(root / "peers/equal/__main__.py") == "peers.equal"


def test_a_command_is_told_without_its_folders() -> None:
    assert _words(["--only", "one", "--out", "elsewhere", "--short"]) == ["--only", "one", "--short"]
