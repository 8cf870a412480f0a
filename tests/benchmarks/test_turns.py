"""`benchmarks.turns`: nothing is timed before all have compiled, nor beside another; a job that fails holds up none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial

import pytest

from benchmarks.turns import in_turns


def job(seconds: float, fails: int = 0) -> Iterator[object]:
    """The process, when it had compiled, and when its timing began and ended; `fails` in that part."""
    if fails == 1:
        raise ValueError("compiling failed")
    time.sleep(seconds)
    ready = time.monotonic()
    yield None
    if fails == 2:
        raise ValueError("timing failed")
    began = time.monotonic()
    time.sleep(0.05)
    yield os.getpid(), ready, began, time.monotonic()


def test_all_compile_before_the_first_is_timed_and_each_is_timed_alone() -> None:
    found = dict(in_turns({"slow": partial(job, 0.5), "quick": partial(job, 0.0)}))
    assert list(found) == ["slow", "quick"]
    assert len({process for process, *_ in found.values()} | {os.getpid()}) == 3
    assert max(ready for _, ready, _, _ in found.values()) <= found["slow"][2]
    assert found["slow"][3] <= found["quick"][2]


@pytest.mark.parametrize("part", [1, 2])
def test_the_others_go_on_without_one_that_fails(part: int) -> None:
    turns = in_turns({"bad": partial(job, 0.0, part), "good": partial(job, 0.0)})
    name, _ = next(turns)
    assert name == "good"
    with pytest.raises(RuntimeError, match="no result of bad"):
        next(turns)
