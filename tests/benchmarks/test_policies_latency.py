"""A schedule's share of the time, from what its kinds of step take."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from benchmarks import policies_latency
from moeca_compile.schedule import Action, Schedule

C, F, R = Action.COMPUTE, Action.FORECAST, Action.REUSE


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Schedule]:
    """Kinds of step take 1, 0.1 and 0.01 of a full one; which schedules were timed."""
    seen: list[Schedule] = []

    def timed(network: Any, schedule: Schedule, steps: int) -> tuple[dict[str, float], Counter[str]]:
        assert schedule.adaptive or len(schedule.rows) == steps
        seen.append(schedule)
        kinds = schedule.distinct_rows()
        return {f"v{i}": 10.0**-i for i in range(len(kinds))}, Counter({"v0": 2, "v1": 8})

    monkeypatch.setattr(policies_latency, "timed", timed)
    monkeypatch.setattr(policies_latency, "_SHARES", {})
    return seen


def test_kinds_of_step_are_weighted_by_how_often_they_come(asked: list[Schedule]) -> None:
    rows = ((C,), (F,), (F,), (R,), (C,))
    share = policies_latency.time_share(None, Schedule(rows), 5)
    assert share == pytest.approx((2 * 1 + 2 * 0.1 + 0.01) / 5)
    assert asked[0].rows == ((C,), (F,), (R,)) * policies_latency.ROUNDS


def test_schedules_of_the_same_kinds_are_timed_once(asked: list[Schedule]) -> None:
    network = object()
    first, second = (
        policies_latency.time_share(network, Schedule(((C,), *((F,),) * count)), 1 + count) for count in (1, 3)
    )
    assert (first, second) == (pytest.approx(1.1 / 2), pytest.approx(1.3 / 4))
    assert len(asked) == 1
    policies_latency.time_share(network, Schedule(((C,), (F,)), order=2), 2)
    assert len(asked) == 2, "another state"


def test_an_adaptive_schedule_is_run_as_a_whole(asked: list[Schedule]) -> None:
    schedule = Schedule.by_drift(0.1)
    assert policies_latency.time_share(None, schedule, 10) == pytest.approx((2 + 0.8) / 10)
    assert asked == [schedule]
