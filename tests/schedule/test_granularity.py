"""What `granularity` may say, what a schedule says of it, and what is said about anything else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moeca_compile.errors import OptionError, ScheduleError
from moeca_compile.options import Options
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.granularity import Granularity


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("region", Granularity("region")),
        ("stack", Granularity("blocks")),
        ("blocks:2:-2", Granularity("blocks", 2, -2, relative=True)),
        ("blocks::3", Granularity("blocks", None, 3, relative=True)),
        ("blocks:1:", Granularity("blocks", 1, None, relative=True)),
        ("skip:4", Granularity("skip", outer=4)),
    ],
)
def test_texts(text: str, meant: Granularity) -> None:
    assert Granularity.parse(text) == meant


@pytest.mark.parametrize("text", ["", "blocks", "blocks:2", "blocks:a:b", "skip", "skip:0", "skip:-1", "Stack"])
def test_another_text_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(OptionError, match=r"not understood; use 'region', 'stack', 'output', 'blocks:START:STOP'"):
        Options(granularity=text)


def test_it_is_a_text() -> None:
    with pytest.raises(OptionError, match="granularity=3"):
        Options(granularity=3)  # type: ignore[arg-type]


# -- what a schedule says of it ---------------------------------------------------------------------------------------


def test_bind_notes_it_and_refuses_another_one() -> None:
    bound = Schedule.uniform(3).bind(("stack",), "abc", "stack")
    assert bound.granularity == "stack"
    assert bound.bind(("stack",), "abc", "stack") == bound
    assert bound.bind(("stack",), "abc").granularity == "stack"
    with pytest.raises(ScheduleError, match=r"for granularity='stack', the model is compiled with 'region': pass gran"):
        bound.bind(("blocks.0.attn",), "xyz", "region")


def test_a_schedule_that_says_none_fits_any() -> None:
    data = json.loads(Schedule.uniform(2).bind(("blocks.0.attn",), "abc", "region").to_json())
    assert data.pop("granularity") == "region"
    old = Schedule.from_json(json.dumps(data))
    assert old.granularity == ""
    assert old.bind(("blocks.0.attn",), "abc", "stack").granularity == "stack"


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(ScheduleError, match="granularity='layers' is not understood; use 'region'"):
        replace(Schedule.full(), granularity="layers")
