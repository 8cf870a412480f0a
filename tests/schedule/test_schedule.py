"""Schedules: makers, which row a step gets, fitting to a graph, JSON, text, and every refusal."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_compile.errors import MoecaError, ScheduleError
from moeca_compile.schedule import Action, Row, Schedule

C, R, F = Action.COMPUTE, Action.REUSE, Action.FORECAST
KEYS = ("blocks.0.attn", "blocks.0.moe", "blocks.1.attn")


def rows(*texts: str) -> tuple[Row, ...]:
    return tuple(tuple(Action(letter) for letter in text) for text in texts)


def letters(schedule: Schedule, steps: int) -> str:
    """What the first column does at each step; `.` where there is no row."""
    found = (schedule.row_index(step) for step in range(steps))
    return "".join("." if index is None else schedule.rows[index][0].value for index in found)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    keys = draw(st.none() | st.lists(st.text(min_size=1), max_size=4, unique=True))
    width, steps = 1 if keys is None else len(keys), draw(st.integers(1, 8))
    order = draw(st.integers(0, 2))
    action = st.sampled_from([C, R, F] if order else [C, R])
    later = draw(st.lists(st.tuples(*[action] * width), min_size=steps - 1, max_size=steps - 1))
    period = draw(st.integers(0, steps))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    times = sorted(draw(st.sets(finite, min_size=steps, max_size=steps)), reverse=draw(st.booleans()))
    timesteps = draw(st.sampled_from([[], times])) if not period else []
    return Schedule(
        rows=((C,) * width, *later),
        regions=None if keys is None else tuple(keys),
        order=order,
        period=period,
        fingerprint=draw(st.text()),
        timesteps=tuple(timesteps),
        made_by=draw(st.text()),
        predicted=draw(st.dictionaries(st.text(), finite, max_size=3)),
    )


# -- makers -----------------------------------------------------------------------------------------------------------


def test_uniform_computes_every_third_step_for_ever() -> None:
    assert letters(Schedule.uniform(3), 11) == "CFFCFFCFFCF"


def test_uniform_copies_with_order_0() -> None:
    schedule = Schedule.uniform(3, order=0)
    assert letters(schedule, 7) == "CRRCRRC"
    assert schedule.order == 0


def test_uniform_warms_up_first() -> None:
    assert letters(Schedule.uniform(2, warmup=4), 11) == "CCCCFCFCFCF"


def test_uniform_1_is_full_and_keeps_no_state() -> None:
    schedule = Schedule.uniform(1, order=2)
    assert letters(schedule, 5) == "CCCCC"
    assert (schedule.order, schedule.depth(0)) == (0, 0)


def test_full_computes_everything_for_ever() -> None:
    assert letters(Schedule.full(), 100) == "C" * 100
    assert Schedule.full().depth(0) == 0


@settings(deadline=None)
@given(interval=st.integers(1, 9), warmup=st.integers(1, 9), order=st.integers(0, 2))
def test_uniform_computes_the_warmup_and_then_every_interval(interval: int, warmup: int, order: int) -> None:
    text = letters(Schedule.uniform(interval, warmup, order), 60)
    computed = [step for step in range(60) if text[step] == "C"]
    assert computed == [*range(warmup), *range(warmup + interval - 1, 60, interval)]
    assert set(text) <= {"C", "F" if order else "R"}


@pytest.mark.parametrize(("interval", "warmup"), [(0, 1), (-1, 1), (3, 0), (3, -2), (2.5, 1)])
def test_uniform_refuses_an_empty_interval_or_warmup(interval: Any, warmup: int) -> None:
    with pytest.raises(ScheduleError, match=rf"interval >= 1 and warmup >= 1, got {interval} and {warmup}"):
        Schedule.uniform(interval, warmup)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("full", Schedule.full()),
        ("uniform:3", Schedule.uniform(3)),
        ("uniform:3:warmup=2", Schedule.uniform(3, warmup=2)),
        ("uniform:1", Schedule.uniform(1)),
    ],
)
def test_short_forms_are_the_makers(text: str, same: Schedule) -> None:
    assert Schedule.parse(text) == same


def test_a_short_form_takes_the_order() -> None:
    assert Schedule.parse("uniform:3", order=2) == Schedule.uniform(3, order=2)


@pytest.mark.parametrize("text", ["full", "uniform:3", "uniform:4:warmup=7"])
def test_made_by_of_a_short_form_is_the_short_form(text: str) -> None:
    assert Schedule.parse(text).made_by.split(",")[0] == text


@pytest.mark.parametrize(
    "text",
    [
        "", "ful", "full:2", "uniform", "uniform:", "uniform:x", "uniform:-3", "uniform:2.5", "uniform:3:2",
        "uniform:3:warmup", "uniform:3:warmup=", "uniform:3:warmup=x", "uniform:3:warm=2", "uniform:3:", "uniform:³",
        "uniform:3:warmup=²", "schedule.txt", ":", "json",
    ],
)  # fmt: skip
def test_parse_refuses_what_it_does_not_understand_and_names_the_forms(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"not understood; use 'full', 'uniform:3'.* path to a \.json"):
        Schedule.parse(text)


@settings(deadline=None)
@given(st.text())
def test_parse_raises_nothing_but_schedule_errors(text: str) -> None:
    with suppress(ScheduleError):
        Schedule.parse(text)


# -- which row --------------------------------------------------------------------------------------------------------


def test_a_closed_schedule_has_no_row_past_its_end() -> None:
    schedule = Schedule(rows("C", "F", "C"))
    assert [schedule.row_index(step) for step in range(6)] == [0, 1, 2, None, None, None]


def test_an_open_schedule_repeats_its_last_rows() -> None:
    schedule = Schedule(rows("C", "C", "F", "R"), period=2)
    assert [schedule.row_index(step) for step in range(9)] == [0, 1, 2, 3, 2, 3, 2, 3, 2]


def test_a_schedule_that_repeats_whole_starts_again() -> None:
    schedule = Schedule(rows("C", "F"), period=2)
    assert [schedule.row_index(step) for step in range(5)] == [0, 1, 0, 1, 0]


def test_recorded_timesteps_choose_the_nearest_row() -> None:
    schedule = Schedule(rows("C", "F", "C", "F"), timesteps=(999.0, 750.0, 500.0, 250.0))
    for timestep, row in [(999, 0), (1200, 0), (880, 0), (870, 1), (500.0, 2), (380, 2), (370, 3), (0, 3), (-5, 3)]:
        assert schedule.row_index(step=77, timestep=timestep) == row


def test_a_timestep_between_two_rows_gets_the_earlier_one() -> None:
    assert Schedule(rows("C", "F"), timesteps=(1.0, 0.0)).row_index(0, 0.5) == 0


def test_without_a_timestep_a_recorded_schedule_counts() -> None:
    schedule = Schedule(rows("C", "F", "C"), timesteps=(9.0, 5.0, 1.0))
    assert [schedule.row_index(step) for step in range(4)] == [0, 1, 2, None]


def test_without_recorded_timesteps_the_timestep_is_not_looked_at() -> None:
    assert Schedule(rows("C", "F", "C")).row_index(1, timestep=999.0) == 1


def test_depth_is_what_the_rows_of_a_column_need() -> None:
    schedule = Schedule(rows("CCCC", "CRFF", "CRRC"), regions=(*KEYS, "more"), order=2)
    assert [schedule.depth(column) for column in range(4)] == [0, 1, 3, 3]


def test_depth_follows_the_order() -> None:
    assert [Schedule(rows("C", "F"), order=order).depth(0) for order in (1, 2)] == [2, 3]


def test_distinct_rows_are_in_order_of_first_use() -> None:
    schedule = Schedule(rows("CC", "RF", "CC", "CF", "RF"), regions=("a", "b"))
    assert schedule.distinct_rows() == rows("CC", "RF", "CF")


# -- fitting to a graph -----------------------------------------------------------------------------------------------


def test_bind_spreads_one_column_over_all_regions() -> None:
    bound = Schedule.uniform(3).bind(KEYS, "abc")
    assert bound.regions == KEYS
    assert bound.fingerprint == "abc"
    assert bound.rows == rows("CCC", "FFF", "FFF", "CCC")
    assert letters(bound, 8) == letters(Schedule.uniform(3), 8)


def test_bind_leaves_a_fitting_schedule_as_it_is() -> None:
    bound = Schedule.uniform(3).bind(KEYS, "abc")
    assert bound.bind(KEYS, "abc") == bound


def test_bind_fills_in_a_missing_fingerprint() -> None:
    schedule = Schedule(rows("CCC", "CRF"), regions=KEYS)
    assert schedule.bind(KEYS, "abc").fingerprint == "abc"


def test_bind_to_a_graph_without_regions_leaves_rows_without_actions() -> None:
    bound = Schedule.full().bind((), "none")
    assert bound.rows == ((),)
    assert bound.distinct_rows() == ((),)
    assert bound.row_index(17) == 0


def test_a_schedule_for_another_graph_is_refused_with_the_difference() -> None:
    schedule = Schedule.uniform(3).bind(KEYS, "abc")
    with pytest.raises(ScheduleError, match="for another graph") as error:
        schedule.bind(("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"), "abc")
    assert "not in the model: ['blocks.0.moe']" in str(error.value)
    assert "not in the schedule: ['blocks.0.mlp']" in str(error.value)
    assert "calibrate" in str(error.value)


def test_a_schedule_with_fewer_or_more_regions_is_refused() -> None:
    schedule = Schedule.uniform(3).bind(KEYS, "abc")
    with pytest.raises(ScheduleError, match=r"not in the model: \['blocks.1.attn'\]; not in the schedule: none"):
        schedule.bind(KEYS[:2], "abc")
    with pytest.raises(ScheduleError, match=r"not in the model: none; not in the schedule: \['extra'\]"):
        schedule.bind((*KEYS, "extra"), "abc")


def test_the_same_regions_in_another_order_are_refused_as_that() -> None:
    with pytest.raises(ScheduleError, match="the same regions in another order"):
        Schedule.uniform(3).bind(KEYS, "abc").bind(KEYS[::-1], "abc")


def test_a_schedule_for_other_shapes_is_refused_with_both_fingerprints() -> None:
    with pytest.raises(ScheduleError, match=r"graph abc, this one is xyz.*other parameter shapes"):
        Schedule.uniform(3).bind(KEYS, "abc").bind(KEYS, "xyz")


# -- refusals of the constructor --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"rows": ()}, "at least one row"),
        ({"rows": rows("C", "CC")}, "row 1 has 2 actions, expected 1"),
        ({"rows": rows("CC", "FF")}, "row 0 has 2 actions, expected 1"),
        ({"rows": rows("CC", "F"), "regions": ("a", "b")}, r"row 1 has 1 actions, expected 2 \(one a region\)"),
        ({"rows": rows("C"), "regions": ()}, r"row 0 has 1 actions, expected 0"),
        ({"rows": rows("F", "C")}, "row 0 must be all COMPUTE"),
        ({"rows": rows("CR"), "regions": ("a", "b")}, "row 0 must be all COMPUTE: nothing can be reused"),
        ({"rows": rows("C"), "order": 3}, "order is 3, expected 0, 1 or 2"),
        ({"rows": rows("C"), "order": -1}, "order is -1"),
        ({"rows": rows("C", "F"), "order": 0}, "FORECAST needs order 1 or 2; with order 0 the action is REUSE"),
        ({"rows": rows("C"), "period": 2}, "period is 2, but there are 1 rows"),
        ({"rows": rows("C"), "period": -1}, "period is -1"),
        ({"rows": rows("C", "F"), "timesteps": (1.0,)}, "timesteps: one a row"),
        ({"rows": rows("C", "F"), "timesteps": (1.0, 0.0), "period": 1}, "that repeats can't have them"),
    ],
)
def test_an_impossible_schedule_is_refused(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        Schedule(**arguments)  # type: ignore[arg-type]


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Schedule.full().order = 2  # type: ignore[misc]


# -- text -------------------------------------------------------------------------------------------------------------


def test_every_schedule_error_is_one_of_ours() -> None:
    assert issubclass(ScheduleError, MoecaError)


def test_a_schedule_prints_as_a_grid() -> None:
    schedule = Schedule(rows("CC", "RF", "CR"), regions=("blocks.0.attn", "mlp"), order=1, made_by="by hand")
    assert str(schedule).splitlines() == [
        "by hand: 2 x 3 steps",
        "blocks.0.attn  #=#",
        "mlp            #/=",
        "# compute   = reuse   / forecast",
    ]


def test_an_open_schedule_prints_what_repeats() -> None:
    assert str(Schedule.uniform(3)).splitlines() == [
        "uniform:3, order 1: 1 x 4 steps, then the last 3 repeat",
        "every region  #//#",
        "# compute   = reuse   / forecast",
    ]


@settings(deadline=None)
@given(schedules())
def test_the_grid_has_one_line_a_region_and_one_mark_a_step(schedule: Schedule) -> None:
    for column in range(len(schedule.rows[0])):
        marks = "".join({C: "#", R: "=", F: "/"}[row[column]] for row in schedule.rows)
        assert f"  {marks}\n" in str(schedule)
