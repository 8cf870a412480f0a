"""A schedule's file: what it holds comes back, and whatever else is in it is refused by name."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule import Control, Schedule
from tests.schedule.test_schedule import KEYS, rows, schedules


def test_only_branches_that_are_not_kept_exactly_are_told_in_the_file() -> None:
    exact = Schedule.by_drift(0.1)
    narrow = replace(exact, control=Control(kept="bfloat16"))
    assert json.loads(narrow.to_json())["control"] == {"score": "error", "kept": "bfloat16"}
    assert Schedule.from_json(narrow.to_json()) == narrow != Schedule.from_json(exact.to_json())
    assert "kept" not in exact.to_json()


@settings(deadline=None)
@given(schedules())
def test_json_gives_the_same_schedule_back(schedule: Schedule) -> None:
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert again.to_json() == schedule.to_json()


@settings(max_examples=10, deadline=None)
@given(schedule=schedules())
def test_a_saved_schedule_loads_by_path_and_by_short_form(
    tmp_path_factory: pytest.TempPathFactory, schedule: Schedule
) -> None:
    path = tmp_path_factory.mktemp("schedules") / "s.json"
    schedule.save(path)
    assert Schedule.load(path) == schedule
    assert Schedule.load(str(path)) == schedule
    assert Schedule.parse(str(path)) == schedule


def changed(**entries: object) -> str:
    """A good schedule's JSON with some entries replaced, or left out where the new one is `...`."""
    data = json.loads(Schedule.uniform(2).bind(KEYS, "abc").to_json()) | entries
    return json.dumps({name: entry for name, entry in data.items() if entry is not ...})


LATER = ("granularity", "control", "partials", "adaptive")  # what the first files didn't have
ENTRIES = tuple(name for name in json.loads(Schedule.full().to_json()) if name not in LATER)


def test_the_unchanged_json_is_read() -> None:
    assert Schedule.from_json(changed()).regions == KEYS


def test_the_earlier_format_is_read() -> None:
    assert Schedule.from_json(changed(version=1)) == Schedule.from_json(changed())


@pytest.mark.parametrize("name", ENTRIES)
def test_a_missing_entry_is_refused_by_name(name: str) -> None:
    with pytest.raises(ScheduleError, match=f"not a readable schedule: {name} is missing"):
        Schedule.from_json(changed(**{name: ...}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a readable schedule: it isn't JSON: Expecting value"),
        ("[]", r"not a readable schedule: it is \[\], expected an object"),
        ("null", "it is None, expected an object"),
        ('{"format": 1, "format": 1}', "'format' is given twice"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a": ' * 100_000, "it is nested too deeply"),
        (changed(order="HERE").replace('"HERE"', "9" * 5000), "it isn't JSON: Exceeds the limit"),
        (changed(more=1), r"unknown entries \['more'\]; known: format, version"),
        (changed(format="onnx"), "format is 'onnx', expected 'moeca-schedule'"),
        (changed(version=7), r"version 7 is newer than this package reads \(6\)"),
        (changed(latent=[0]), r"latent is \[0\], expected a list of sizes"),
        (changed(latent=4), "latent is 4, expected a list of sizes"),
        (changed(hand_over=1), "hand_over is 1, expected true or false"),
        (changed(version="new"), "version is 'new', expected a whole number"),
        (changed(version=float("nan")), "version is nan, expected a whole number"),
        (changed(version=0.5), "version is 0.5, expected a whole number"),
        (changed(version=True), "version is True, expected a whole number"),
        (changed(version=-5), "version -5 is no version there was"),
        (changed(rows=["CCC", "CXC"]), "row 'CXC': 'X' is no action; known here: C, R, F"),
        (changed(rows=7), "rows is 7, expected a list of texts"),
        (changed(rows="CCC"), "rows is 'CCC', expected a list of texts"),
        (changed(rows=["CCC", ["C"]]), r"rows holds \['C'\], expected texts"),
        (changed(rows=["CCC"] * 10_001, period=0), "at most 10000 rows, this one has 10001"),
        (changed(regions="abc"), "regions is 'abc', expected a list of texts"),
        (changed(partials={"C": [0.1, 0.1]}), "partials: 'C' is no small letter"),
        (changed(partials={"a": 0.1}), r"partials: a is 0.1, expected \[rho, tau\]"),
        (changed(partials={"a": [10**400, 0]}), "rho is 1000.*, expected a fraction"),
        (changed(rows=["CCC", "CaC"]), "row 'CaC': 'a' is no action; known here: C, R, F"),
        (changed(rows=["CCC", "CaC"], partials={"a": [0.5, 1.5]}), "PARTIAL: tau is 1.5, expected a fraction"),
        (changed(rows=["CCC", "CaC"], partials={"a": [0.1, 0.2, 0.3]}), "shared is 0.3, expected true or false"),
        (changed(control={"weights": {}}), r"control has unknown entries \['weights'\]; known: score, sensitivity"),
        (changed(control={"sensitivity": {"m": ["x"]}}), "m: 'x' isn't a finite number"),
        (changed(adaptive={"warmup": 2}), "adaptive.thresholds is missing"),
        (changed(adaptive={"thresholds": [10**400]}), "thresholds: 1000.* isn't a finite number"),
        (changed(adaptive={"thresholds": [0.1], "most": 2.5}), "most is 2.5, expected a whole number"),
        (changed(control={"kept": "int8"}), "control: kept is 'int8', expected one of exact, bfloat16"),
        (changed(control={"score": "guess"}), "control: score is 'guess', expected one of drift, error"),
        (changed(control={"sensitivity": {"m": [-1.0, 1.0]}}), "control: sensitivity of m"),
        (changed(control={"threshold": {"m": [0.5, float("nan")]}}), "m: nan isn't a finite number"),
        (changed(control={"quota": {"m": [0.9, 0.3]}}), "the quotas of m sum to 1.2, at most 1 is there"),
        (changed(order="two"), "order is 'two', expected a whole number"),
        (changed(period=float("inf")), "period is inf, expected a whole number"),
        (changed(timesteps=["noon"]), "timesteps: 'noon' isn't a finite number"),
        (changed(timesteps=[10**400]), "timesteps: 1000.* isn't a finite number"),
        (changed(timesteps=[float("inf")]), "timesteps: inf isn't a finite number"),
        (changed(granularity=7), "granularity is 7, expected a text"),
        (changed(predicted=[1]), r"predicted is \[1\], expected an object"),
        (changed(predicted={"psnr_db": float("nan")}), "psnr_db: nan isn't a finite number"),
        (changed(rows=["FFF"]), "row 0 must be all COMPUTE"),
        (changed(rows=["CC", "CC", "CC"]), "row 0 has 2 actions, expected 3"),
    ],
)
def test_damaged_json_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        Schedule.from_json(text)


@settings(deadline=None)
@given(st.data())
def test_an_altered_file_gives_a_schedule_or_a_schedule_error(data: st.DataObject) -> None:
    """Any entry, of the file or of an object in it, replaced by any JSON."""
    whole = json.loads(Schedule.by_drift(0.1).to_json()) | {"timesteps": [1.0, 2.0], "partials": {"a": [0.1, 0.2]}}
    whole["control"] = {"score": "drift", "quota": {"m": [0.5]}}
    number = st.integers() | st.floats() | st.just(10**400)
    leaves = st.none() | st.booleans() | number | st.text(max_size=3)
    anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))
    holder = data.draw(st.sampled_from([whole, *(whole[name] for name in ("adaptive", "control", "partials"))]))
    holder[data.draw(st.sampled_from(sorted(holder)))] = data.draw(anything)
    with suppress(ScheduleError):
        Schedule.from_json(json.dumps(whole))


@pytest.mark.parametrize(
    "text",
    [
        "uniform:999999999",
        "uniform:999999999999",
        "uniform:3:warmup=99999999",
        "uniform:" + "9" * 5000,
        "adaptive:" + "9" * 400,
    ],
)
def test_short_forms_of_absurd_size_are_refused_at_once(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"rows of a schedule|not understood"):
        Schedule.parse(text)


def test_a_short_form_takes_each_entry_once() -> None:
    with pytest.raises(ScheduleError, match="not understood"):
        Schedule.parse("uniform:3:warmup=2:warmup=5")


@pytest.mark.parametrize(
    "path", ["a\0b.json", "x" * 5000 + ".json", "\ud800.json"], ids=["a zero byte", "a long name", "half a character"]
)
def test_a_path_that_no_file_has_is_refused(path: str) -> None:
    for use in (Schedule.load, Schedule.parse, Schedule.full().save):
        with pytest.raises(ScheduleError, match=r"schedule file .*can't be (read|written)"):
            use(path)


def test_a_file_that_is_no_schedule_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(ScheduleError, match=r"schedule file '.*s\.json': not a readable schedule: format is missing"):
        Schedule.load(tmp_path / "s.json")


@pytest.mark.parametrize("timesteps", [("noon",), (None,), (10**400,), (float("nan"),), 7])
def test_timesteps_that_are_no_numbers_are_refused(timesteps: object) -> None:
    with pytest.raises(ScheduleError, match=r"timesteps: .*expected finite numbers"):
        Schedule(rows("C"), timesteps=timesteps)  # type: ignore[arg-type]


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"missing\.json': it can't be read: No such file"):
        Schedule.parse(str(tmp_path / "missing.json"))
    with pytest.raises(ScheduleError, match="it can't be read: Is a directory"):
        Schedule.load(tmp_path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ScheduleError, match="can't be read: it isn't text"):
        Schedule.load(path)
