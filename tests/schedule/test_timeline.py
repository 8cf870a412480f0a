"""Rows that belong to timesteps, met by calls at other timesteps: nothing that was meant to be computed is skipped."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sized
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeca_compile.errors import MoecaWarning, ScheduleError
from moeca_compile.runtime.driver import StepDriver
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Action, Partial, Row, Schedule

C, R, F = Action.COMPUTE, Action.REUSE, Action.FORECAST
KEYS = ("attn", "moe", "mlp")


def schedule_of(text: str, timesteps: list[float], **fields: object) -> Schedule:
    """One letter a row, the same in every region."""
    return Schedule(tuple((Action(one),) for one in text), timesteps=tuple(timesteps), **fields)  # type: ignore[arg-type]


def play(schedule: Schedule, times: list[float]) -> tuple[list[Row], list[str]]:
    """The rows that calls at `times` run, and the warnings."""
    warned = Warned()
    driver, state = StepDriver(schedule, warned), StreamState((), len(schedule.rows[0]))
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoecaWarning)
        for step, time in enumerate(times):
            row, _ = driver.choose(state, step, time)
            driver.keep(state, step, row, (), ())
            rows.append(row)
    return rows, list(warned.counts)


def letters(rows: list[Row], column: int = 0) -> str:
    return "".join(row[column].value if isinstance(row[column], Action) else "p" for row in rows)


def falling(steps: int, start: float = 1000.0) -> list[float]:
    return [start * (1 - i / steps) for i in range(steps)]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kinds: list[Row] = [(C, C, C), (F, F, F), (C, F, F), (F, C, F), (R, F, C), (Partial(0.2, 0.1), F, F)]
    rows = draw(st.lists(st.sampled_from(draw(st.permutations(kinds))[:4]), min_size=1, max_size=24))
    gaps = draw(st.lists(st.integers(1, 9), min_size=len(rows) + 1, max_size=len(rows) + 1))
    times = [float(one) for one in itertools.accumulate(gaps)]
    if draw(st.booleans()):
        times.reverse()
    return Schedule(((C, C, C), *rows), KEYS, timesteps=tuple(times))


@st.composite
def calls(draw: st.DrawFn, schedule: Schedule, even: bool = False) -> list[float]:
    """Timesteps of a trajectory in the schedule's direction or against it, from somewhere to somewhere."""
    low, high = sorted((schedule.timesteps[0], schedule.timesteps[-1]))
    number = draw(st.integers(2, 40))
    if even:
        times = [low + (high - low) * i / number for i in range(number)]
    else:
        times = sorted(draw(st.sets(st.floats(low - 5, high + 5, width=32), min_size=2, max_size=number)))
    return times if draw(st.booleans()) else times[::-1]


@settings(deadline=None)
@given(schedules())
def test_the_recorded_timesteps_run_the_rows_as_they_are(schedule: Schedule) -> None:
    for first in range(len(schedule.rows)):
        rows, told = play(schedule, list(schedule.timesteps[first:]))
        assert rows == [schedule.rows[0], *schedule.rows[first + 1 :]]
        assert len(told) == (first > 0)


@settings(deadline=None)
@given(schedules())
def test_timesteps_rounded_to_bfloat16_run_the_rows_as_they_are(schedule: Schedule) -> None:
    moved = [time * (1 + 2**-9 * (-1) ** i) for i, time in enumerate(schedule.timesteps)]
    assume(all(abs(a - b) < 0.25 for a, b in zip(moved, schedule.timesteps, strict=True)))
    assert play(schedule, moved) == (list(schedule.rows), [])


@settings(deadline=None)
@given(st.data(), schedules())
def test_a_computation_that_was_passed_is_made_up(data: st.DataObject, schedule: Schedule) -> None:
    """Between the calls that pass two computations of a region, it is computed."""
    times = data.draw(calls(schedule))
    rows, _ = play(schedule, times)
    assert set(rows) <= set(schedule.rows)
    nearest = [schedule.row_index(0, time) or 0 for time in times]
    forward = nearest[-1] >= nearest[0]
    for column in range(3):
        meant = [i for i, row in enumerate(schedule.rows) if row[column] is C]
        firsts = [
            next((n for n, call in enumerate(nearest) if (one <= call if forward else one >= call)), None)
            for one in meant
        ]
        at = sorted({one for one in firsts if one is not None} | {0})
        for before, here in itertools.pairwise(at):
            assert any(rows[n][column] is C for n in range(before + 1, here + 1)), (column, before, here)


@settings(deadline=None)
@given(st.data(), schedules())
def test_the_time_between_computations_is_at_most_the_schedules(data: st.DataObject, schedule: Schedule) -> None:
    times = data.draw(calls(schedule, even=True))
    rows, _ = play(schedule, times)
    step = abs(times[1] - times[0])
    edge = schedule.timesteps[-1] + (schedule.timesteps[-1] - schedule.timesteps[-2])
    for column in range(3):
        meant = [time for time, row in zip(schedule.timesteps, schedule.rows, strict=True) if row[column] is C]
        longest = max(abs(a - b) for a, b in itertools.pairwise([*meant, edge]))
        found = [time for time, row in zip(times, rows, strict=True) if row[column] is C]
        assert all(abs(a - b) <= max(longest, step) * 1.001 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("more", [2, 3, 7])
def test_more_steps_compute_no_more_than_the_schedule(more: int) -> None:
    schedule = schedule_of("CCFFCFFFCFC", falling(11))
    rows, told = play(schedule, falling(11 * more))
    assert letters(rows).count("C") == 5
    assert len(told) == 1


@pytest.mark.parametrize(
    ("steps", "share"), [(100, 0.17), (50, 0.34), (40, 0.40), (33, 0.48), (25, 0.60), (20, 0.75), (10, 1.0)]
)
def test_the_share_that_a_calibrated_schedule_computes_of_other_numbers_of_steps(steps: int, share: float) -> None:
    schedule = Schedule.load(Path(__file__).parents[2] / "examples/schedules/digits_34.json")
    rows, told = play(schedule, falling(steps))
    assert letters(rows).count("C") / steps == pytest.approx(share, abs=0.01)
    assert len(told) == (steps != 50)


def test_fewer_steps_make_up_what_they_pass() -> None:
    schedule = schedule_of("CFFFFCFFFFFCFFFF", falling(16))
    assert letters(play(schedule, falling(8))[0]) == "CFFCFFCF"


def test_a_computation_done_ahead_is_not_done_again() -> None:
    """Computed at 400 because 250 would be too late; the row at 500 isn't made up for once more."""
    schedule = schedule_of("CFFFFCFFFFC", [float(one) for one in range(1000, -1, -100)])
    times = [1000.0, 850.0, 700.0, 550.0, 400.0, 250.0, 100.0, 0.0]
    assert letters(play(schedule, times)[0]) == "CFFCFFCF"


def test_a_region_is_made_up_by_the_cheapest_row_that_computes_it() -> None:
    rows = ((C, C, C), (F, F, F), (C, F, F), (F, F, F), (F, F, F), (F, F, F))
    schedule = Schedule(rows, KEYS, timesteps=tuple(falling(6, 6.0)))
    assert play(schedule, [6.0, 3.0, 1.0])[0] == [(C, C, C), (C, F, F), (F, F, F)]


def test_two_regions_that_no_row_computes_together_are_made_up_by_the_full_row() -> None:
    rows = ((C, C, C), (F, C, F), (C, F, F), (F, F, F), (F, F, F), (F, F, F))
    schedule = Schedule(rows, KEYS, timesteps=tuple(falling(6, 6.0)))
    assert play(schedule, [6.0, 3.0, 1.0])[0] == [(C, C, C), (C, C, C), (F, F, F)]


def test_partial_rows_that_were_passed_are_made_up() -> None:
    some, more = Partial(0.1, 0.1), Partial(0.2, 0.1)
    rows = ((C,), (some,), (more,), (F,), (F,), (F,), (C,))
    schedule = Schedule(rows, timesteps=tuple(falling(7, 7.0)))
    assert play(schedule, [7.0, 4.0, 3.0])[0] == [(C,), (more,), (F,)]


@pytest.mark.parametrize(
    ("times", "says"),
    [
        (falling(5), "step 1 is at timestep 800, but the schedule has 900 there"),
        ([600.0, 500.0], "step 0 is at timestep 600, but the schedule goes from 1000 to 100"),
        ([1040.0, 900.0], "step 0 is at timestep 1040, but the schedule goes from 1000 to 100"),
        ([*falling(10), 50.0], "step 10 is at timestep 50, but the schedule goes from 1000 to 100"),
    ],
)
def test_other_timesteps_are_warned_of_once(times: list[float], says: str) -> None:
    _, told = play(schedule_of("CFFCFFCFFC", falling(10)), times)
    assert len(told) == 1
    assert says in told[0]
    assert "moeca_compile.calibrate" in told[0]


def test_timesteps_a_tenth_of_a_step_away_are_the_schedules_own() -> None:
    schedule = schedule_of("CFFCFFCFFC", falling(10))
    assert play(schedule, [time - 10 for time in falling(10)]) == (list(schedule.rows), [])


@pytest.mark.parametrize("times", [(1.0, 1.0), (1.0, 2.0, 1.5)])
def test_timesteps_that_do_not_go_one_way_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(ScheduleError, match="only fall or only rise"):
        schedule_of("CFF"[: len(times)], list(times))


def test_a_stream_without_an_end_keeps_nothing_by_step() -> None:
    schedule = Schedule.uniform(3)
    driver, state = StepDriver(schedule, Warned()), StreamState((), 1)
    before = {name: len(value) for name, value in vars(driver).items() if isinstance(value, Sized)}
    for step in range(40):
        row, _ = driver.choose(state, step, None)
        assert row == schedule.rows[schedule.row_index(step) or 0]
        driver.keep(state, step, row, (), ())
        assert before == {name: len(value) for name, value in vars(driver).items() if isinstance(value, Sized)}
