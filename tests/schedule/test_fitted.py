"""Fitted weights of regions: what a schedule's file says of them, and what it can't say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from moeca_compile.errors import ScheduleError
from moeca_compile.inspect.schedules import facts
from moeca_compile.schedule import Partial, Schedule
from moeca_compile.schedule.adaptive import Adaptive
from moeca_compile.schedule.fitted import FittedWeights
from tests.tools import row

KEYS = ("a", "b", "c")
ROWS = ("CCC", "FFR", "CCC", "FCF")
WEIGHTS = ((), ((1.5,), ()), (), ((1.0, 0.5), (), (2.0, 0.0)))


def cells(*steps: tuple[tuple[float, ...], ...]) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple((*step, *((),) * (len(KEYS) - len(step))) for step in steps)


def schedule(*steps: tuple[tuple[float, ...], ...], rows: tuple[str, ...] = ROWS, **rest: Any) -> Schedule:
    return Schedule(tuple(map(row, rows)), KEYS, fitted=FittedWeights(cells(*(steps or WEIGHTS))), **rest)


def test_it_is_written_and_read() -> None:
    text = schedule().to_json()
    assert Schedule.from_json(text) == schedule()
    assert json.loads(text)["version"] == 3
    assert json.loads(text)["fitted"]["weights"][3] == [[1.0, 0.5], [], [2.0, 0.0]]
    assert "fitted" not in json.loads(replace(schedule(), fitted=None).to_json())


def test_a_region_keeps_what_its_weights_and_its_polynomial_read() -> None:
    assert [schedule().depth(column) for column in range(3)] == [2, 2, 2]
    assert [schedule(order=2).depth(column) for column in range(3)] == [3, 3, 3]
    deep = schedule((), (), (), (), ((1.0, 0.0, 0.0, 2.0),), rows=("CCC", "CCC", "CRC", "CCC", "FRC"))
    assert [deep.depth(column) for column in range(3)] == [4, 1, 0]


def test_its_facts_tell_people() -> None:
    told = "at 2 steps, over up to 2 outputs of a region, fitted to uncached samples"
    assert str(schedule().fitted) == told
    assert facts(schedule())["fitted_weights"] == told
    assert facts(replace(schedule(), fitted=None))["fitted_weights"] is None


NAN = float("nan")
PARTIAL = Schedule((row("C"), (Partial(0.5),), row("F")), ("a",))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FittedWeights((((1.0,) * 5,),)), "step 0, column 0 has 5 weights, at most 4"),
        (lambda: FittedWeights((((), (1.0, NAN)),)), "step 0, column 1 has a weight that isn't finite"),
        (lambda: FittedWeights((), "somewhere"), "truth is 'somewhere', expected one of uncached, converged"),
        (lambda: schedule((), ()), "weights of 2 steps for 4 rows"),
        (lambda: schedule(period=2), "neither repeats nor adapts"),
        (lambda: schedule((), (), rows=("CCC", "RFF"), adaptive=Adaptive((0.1,))), "neither repeats nor adapts"),
        (lambda: Schedule((row("C"),), fitted=FittedWeights((((),),))), "a schedule with regions"),
        (lambda: replace(schedule(), fitted=FittedWeights(((),) * 4)), "step 0 has weights for 0 regions, there are 3"),
        (lambda: schedule(((1.0,),), (), (), ()), "step 0, column 0 has weights at COMPUTE"),
        (lambda: schedule((), ((), (), (1.0,)), (), ()), "step 1, column 2 has weights at REUSE"),
        (lambda: schedule((), ((1.0, 0.5),), (), ()), "column 0 weighs y1, but the region was computed 1 times"),
        (
            lambda: replace(PARTIAL, fitted=FittedWeights((((),), ((),), ((1.0,),)))),
            "region that is computed in part",
        ),
    ],
)
def test_weights_that_can_not_be(make: Any, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        make()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"truth": "uncached", "weights": 5}, "fitted: weights is no list of rows"),
        ({"truth": "uncached", "weights": [5]}, "fitted: weights is no list of rows"),
        ({"truth": "uncached", "weights": [[5], [], [], []]}, "fitted.weights is 5, expected a list of numbers"),
        ({"truth": "uncached", "weights": [[["a"]], [], [], []]}, "isn't a finite number"),
        ({"weights": []}, "fitted.truth is missing"),
        ({"truth": "uncached", "weights": [], "more": 1}, "fitted has unknown entries"),
    ],
)
def test_files_that_can_not_be(entry: Any, says: str) -> None:
    data = json.loads(schedule().to_json()) | {"fitted": entry}
    with pytest.raises(ScheduleError, match=says):
        Schedule.from_json(json.dumps(data))
