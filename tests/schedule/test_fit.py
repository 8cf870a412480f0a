"""What a schedule may ask of which region, and how it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeca_compile.errors import ScheduleError
from moeca_compile.graph.fit import fit
from moeca_compile.graph.regions import (
    BranchesInfo,
    Cut,
    Divisible,
    Indivisible,
    Region,
    RegionMap,
    RouterInfo,
    Value,
)  # fmt: skip
from moeca_compile.schedule import Action, Control, Partial, Row, Schedule

C, R, F = Action.COMPUTE, Action.REUSE, Action.FORECAST
SHAPE = (2, 4, 8)
PART = Value("out", SHAPE, "float32")


def region(key: str, kind: str, division: Divisible | Indivisible) -> Region:
    routers = (RouterInfo("topk", "scores", 4, 2),) if kind == "experts" else ()
    return Region(
        key,
        kind,
        0,
        (Cut(key, SHAPE, "float32", "cpu"),),
        (key,),
        routers=routers,
        division=division,
    )


TOKENS = Divisible(2, 4, (PART,), enters=PART)
VALUE = Value("experts", (2, 4, 2, 8), "float32")
BRANCHES = Divisible(2, 4, (), branches=BranchesInfo(VALUE, gates="g", scores="s", num_experts=4))
REGIONS = RegionMap((region("attn", "attention", TOKENS), region("moe", "experts", BRANCHES)))
MIXES, CHOOSES = Indivisible("it mixes"), Indivisible("the expert chooses")
WHOLE = RegionMap((region("attn", "attention", MIXES), region("moe", "experts", CHOOSES)))


def rows(*acts: Row) -> Schedule:
    return Schedule(((C, C), *acts), ("attn", "moe"))


def test_branches_are_kept_and_tokens_where_some_are_recomputed() -> None:
    assert fit(rows((Partial(0.5), Partial(0, 0.5))), REGIONS).rows[1] == (Partial(0.5), Partial(0, 0.5))


@pytest.mark.parametrize(("order", "act"), [(0, R), (1, F)])
def test_a_region_without_branches_whose_tokens_all_stay_is_forecast_whole(order: int, act: Action) -> None:
    schedule = replace(rows((Partial(0, 0.5), Partial(0, 0.5))), order=order)
    assert fit(schedule, REGIONS).rows[1] == (act, Partial(0, 0.5))


def test_one_action_for_every_region_is_spread() -> None:
    assert fit(Schedule(((C,), (Partial(0, 0.1),))), REGIONS).rows[1] == (F, Partial(0, 0.1))


@pytest.mark.parametrize(
    ("acts", "reason"),
    [
        (
            (Partial(0.5), C),
            r"region attn can't be recomputed in part \(PARTIAL\(0.5, 0\)\): it mixes. Give it COMPUTE",
        ),
        ((C, Partial(0, 0)), r"region moe can't be recomputed in part \(PARTIAL\(0, 0\)\): the expert chooses"),
    ],
)
def test_a_region_that_has_no_parts(acts: Row, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        fit(rows(acts), WHOLE)


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        (Control(sensitivity={"moe": (1.0, 2.0)}), "sensitivity of moe has 2 numbers for 4 experts"),
        (Control(threshold={"moe": (1.0,) * 5}), "threshold of moe has 5 numbers for 4 experts"),
        (Control(quota={"attn": (0.1,) * 4}), r"quota of 'attn', which is no region with branches; those: \['moe'\]"),
    ],
)
def test_a_control_of_other_experts(control: Control, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        fit(replace(rows((F, Partial(0, 0.1))), control=control), REGIONS)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), "half", True])
@pytest.mark.parametrize("name", ["rho", "tau"])
def test_fractions_outside_zero_and_one(name: str, wrong: object) -> None:
    with pytest.raises(ScheduleError, match=f"PARTIAL: {name} is .*, expected a fraction from 0 to 1"):
        Partial(**{name: wrong})  # type: ignore[arg-type]


def test_counts_are_rounded_up_but_not_by_float_dust() -> None:
    assert (Partial(0.001).tokens(64), Partial(0.1).tokens(10), Partial(0.3).tokens(10)) == (1, 1, 3)
    assert (Partial(1, 1).tokens(7), Partial(1, 1).branches(14), Partial().branches(14)) == (7, 14, 0)


def test_too_many_kinds_for_one_file() -> None:
    kinds = tuple((C, Partial(i / 100)) for i in range(27))
    with pytest.raises(ScheduleError, match="27 kinds of PARTIAL in one schedule, at most 26"):
        rows(*kinds)
