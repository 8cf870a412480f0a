"""What `stats` says: a line a step, totals, the speedup against computed steps, all trajectories since the reset."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import moeca_compile as moeca
from moeca_compile.graph import capture
from moeca_compile.runtime.stats import Stats, StepRecord
from tests.docs import world

NAMES = ["v0", "v1", "v1", "v0", "v1", "v1", "v0", "v1"]


def record(step: int, ms: float, macs: int, full_macs: int = 10, **more: Any) -> StepRecord:
    return StepRecord(step, "0", "v0" if macs == full_macs else "v1", ms, 1.0, macs, False, 0, full_macs, **more)


def stats(*trajectories: tuple[StepRecord, ...], on_host: bool = True) -> Stats:
    return Stats(trajectories[-1], 2**20, 0.5, 1, {}, trajectories=trajectories, on_host=on_host)


def test_speedup_is_against_the_median_computed_step() -> None:
    first = (record(0, 9.0, 10), record(1, 99.0, 10))  # the median over both trajectories is 10 with the overhead
    last = (record(0, 9.0, 10), record(1, 1.0, 2), record(2, 2.0, 2))
    assert stats(first, last).speedup == pytest.approx(30 / 15)
    assert stats(last, on_host=False).speedup is None
    assert stats(last[1:]).speedup is None  # no computed step


def test_the_speedup_of_a_trajectory_stays_as_it_is() -> None:
    first = (record(0, 9.0, 10), record(1, 1.0, 2))
    slow = (record(0, 49.0, 10), record(1, 49.0, 10))
    alone = str(stats(first)).splitlines()[1]
    line = next(line for line in str(stats(first, slow)).splitlines() if line.startswith("  0:"))
    assert line == f"  0: 2 calls, {alone}"


def test_steps_of_other_sizes_are_compared_with_their_own() -> None:
    small, large = (record(0, 1.0, 10), record(1, 0.0, 2)), (record(0, 19.0, 40, 40), record(1, 1.0, 8, 40))
    assert stats(small, large).speedup == pytest.approx(40 / 22)


def test_it_prints_a_line_for_each_step_and_trajectory() -> None:
    steps = (record(0, 9.0, 10, timestep=900.0), StepRecord(1, "0", "v0", 9.0, 1.0, 10, True, 0, 10, 800.0))
    lines = str(stats((record(0, 9.0, 10),), steps)).split("\n")
    assert lines[0] == "2 calls (2 x v0, 1 cold), 50.0% of the MACs, 1.00 MiB of state, 1 graph(s)"
    assert lines[1] == "20.0 ms, 1.00 times as fast as computed steps"
    assert [line.split() for line in lines[3:6]] == [
        ["step", "timestep", "variant", "ms", "overhead"],
        ["0", "900", "v0", "9.00", "1.00"],
        ["1", "800", "v0", "cold", "9.00", "1.00"],
    ]
    assert lines[7:] == [
        "2 trajectories since the last reset, 3 calls:",
        "  0: 1 calls, 10.0 ms, 1.00 times as fast as computed steps",
        "  1: 2 calls, 20.0 ms, 1.00 times as fast as computed steps",
    ]


def test_streams_have_a_column_where_there_are_several() -> None:
    other = StepRecord(0, "1", "v0", 9.0, 1.0, 10, False, 0, 10)
    assert " stream " in str(stats((record(0, 9.0, 10), other)))
    assert " stream " not in str(stats((record(0, 9.0, 10),)))


def test_host_times_of_an_accelerator_are_called_that() -> None:
    text = str(stats((record(0, 9.0, 10),), on_host=False))
    assert "10.0 ms on the host, which doesn't wait for the device" in text
    assert "times as fast" not in text


def test_all_trajectories_since_the_reset_are_told() -> None:
    model = moeca.compile(world.model(), schedule="uniform:3", inner="eager")
    for seed in range(3):
        world.sample(model, seed)
    told = moeca.stats(model)
    assert [[step.variant for step in trajectory] for trajectory in told.trajectories] == [NAMES] * 3
    assert told.trajectories[-1] == told.steps
    assert told.on_host
    assert told.speedup is not None
    assert "3 trajectories since the last reset, 24 calls:" in str(told)
    moeca.reset(model)
    assert moeca.stats(model).trajectories == ()
    with moeca.trajectory(model, steps=world.STEPS):
        world.sample(model)
    world.sample(model)
    assert [len(trajectory) for trajectory in moeca.stats(model).trajectories] == [world.STEPS] * 2


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """No step is timed together with a garbage collection, which takes longer than compiling this small model."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
def test_compiling_is_in_no_step_s_time() -> None:
    model = moeca.compile(world.model(), schedule="uniform:3", inner="eager")
    world.sample(model)
    first = moeca.stats(model)
    world.sample(model)
    slowest = max(step.total_ms for step in first.steps)
    assert slowest / 1e3 < sum(first.compile_seconds.values()) / 2


def test_the_capture_is_in_the_seconds_of_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a graph that an earlier program serves, too: the inputs have other strides."""
    traced = capture._traced

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return traced(*args)

    monkeypatch.setattr(capture, "_traced", slow)
    model = moeca.compile(world.model(), schedule="uniform:3", inner="eager")
    x, *others = torch.randn(3, 2, 4, 4), torch.full((3,), 900.0), torch.tensor([1, 2, 3])
    with torch.no_grad():
        model(x, *others)
        first = moeca.stats(model).compile_seconds["capture"]
        model(x.to(memory_format=torch.channels_last), *others)
    assert first > 0.5
    assert moeca.stats(model).compile_seconds["capture"] > first + 0.5
