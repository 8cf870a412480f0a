"""Options: what is taken, what is refused, and what the refusal says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from torch.nn import Linear

import moeca_compile as moeca
from moeca_compile.errors import OptionError, ScheduleError
from moeca_compile.options import INNERS, Options
from moeca_compile.schedule import Schedule


def test_the_defaults_are_careful() -> None:
    options = Options()
    assert options.resolved_schedule() == Schedule.uniform(2, warmup=4, order=1)
    assert options.inner == "inductor"
    assert options.disable == ()


def test_no_options_are_the_defaults() -> None:
    assert Options.from_backend_options(None) == Options.from_backend_options({}) == Options()


@pytest.mark.parametrize("name", [field.name for field in fields(Options)])
def test_every_field_is_a_backend_option(name: str) -> None:
    default = getattr(Options(), name)
    assert Options.from_backend_options({name: default}) == Options()


@pytest.mark.parametrize(
    "given",
    [
        {"schedule": Schedule.uniform(5)}, {"schedule": "full"}, {"schedule": Path("s.json")}, {"order": 0},
        {"order": 2}, {"inner": "eager"}, {"inner_options": {"max_autotune": True}}, {"max_signatures": 1},
        {"latent_jump": 2}, {"latent_jump": 0.1}, {"disable": ("drop_noops",)}, {"dump": "folder"},
    ],
)  # fmt: skip
def test_good_values_are_kept(given: dict[str, Any]) -> None:
    options = Options.from_backend_options(given)
    assert all(getattr(options, name) == value for name, value in given.items())


def test_a_list_of_passes_becomes_a_tuple() -> None:
    assert Options(disable=["drop_noops"]).disable == ("drop_noops",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "wrong", "wanted"),
    [
        ("order", 3, "0, 1 or 2"),
        ("order", -1, "0, 1 or 2"),
        ("order", 1.0, "0, 1 or 2"),
        ("order", True, "0, 1 or 2"),
        ("order", "1", "0, 1 or 2"),
        ("schedule", 3, "a Schedule, a path or a short form"),
        ("schedule", None, "a Schedule, a path or a short form"),
        ("inner_options", [("a", 1)], "a dict of the inner compiler's options"),
        ("inner_options", None, "a dict of the inner compiler's options"),
        ("max_signatures", 0, "a whole number >= 1"),
        ("max_signatures", 2.0, "a whole number >= 1"),
        ("max_signatures", True, "a whole number >= 1"),
        ("latent_jump", 0, "a number > 0"),
        ("latent_jump", -0.5, "a number > 0"),
        ("latent_jump", float("nan"), "a number > 0"),
        ("latent_jump", "0.7", "a number > 0"),
        ("disable", "drop_noops", "a tuple of pass names"),
        ("disable", None, "a tuple of pass names"),
        ("mode", 3, "torch.compile's mode"),
        ("dump", 3, "a folder"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(name: str, wrong: Any, wanted: str) -> None:
    with pytest.raises(OptionError, match=f"option {name}=.*expected {wanted}"):
        Options.from_backend_options({name: wrong})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("shedule", "schedule"), ("orders", "order"), ("inner_option", "inner_options"), ("disabled", "disable")],
)
def test_an_unknown_option_is_refused_with_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(OptionError, match=f"unknown option '{typo}'; did you mean '{meant}'\\?; known: schedule, "):
        Options.from_backend_options({typo: 1})


def test_an_option_like_no_other_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(OptionError) as error:
        Options.from_backend_options({"qqqq": 1})
    assert "did you mean" not in str(error.value)
    assert all(field.name in str(error.value) for field in fields(Options))


def test_an_unknown_inner_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"inner='inducter': expected one of .*; did you mean 'inductor'\?"):
        Options(inner="inducter")
    with pytest.raises(OptionError, match=r"inner='xla': expected one of \('inductor', 'eager'\)$"):
        Options(inner="xla")
    assert set(INNERS) == {"inductor", "eager"}


@pytest.mark.parametrize("given", [{"inner_options": {"max_autotune": True}}, {"mode": "max-autotune"}])
def test_the_eager_inner_refuses_what_it_would_ignore(given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="inner='eager' takes no mode and no inner_options"):
        Options(inner="eager", **given)


def test_the_eager_inner_refuses_torch_compiles_mode() -> None:
    with pytest.raises(OptionError, match="inner='eager' takes no mode"):
        Options.from_backend_options({"inner": "eager"}, mode="reduce-overhead")


@pytest.mark.parametrize("mode", [None, "default"])
def test_the_default_mode_is_no_mode(mode: str | None) -> None:
    assert Options.from_backend_options({"inner": "eager"}, mode=mode).mode is None


def test_torch_compiles_mode_is_kept() -> None:
    assert Options.from_backend_options(None, mode="max-autotune-no-cudagraphs").mode == "max-autotune-no-cudagraphs"


def test_a_short_form_takes_the_order_option() -> None:
    assert Options(schedule="uniform:3", order=2).resolved_schedule() == Schedule.uniform(3, order=2)
    assert Options(schedule="uniform:3", order=0).resolved_schedule() == Schedule.uniform(3, order=0)


@pytest.mark.parametrize("order", [None, 2])
def test_a_schedule_keeps_its_own_order(tmp_path: Path, order: int | None) -> None:
    schedule = Schedule.uniform(3, order=2)
    schedule.save(tmp_path / "s.json")
    assert Options(schedule=schedule, order=order).resolved_schedule() is schedule
    assert Options(schedule=tmp_path / "s.json", order=order).resolved_schedule() == schedule


@pytest.mark.parametrize("order", [0, 1])
def test_another_order_than_the_schedules_is_refused(tmp_path: Path, order: int) -> None:
    schedule = Schedule.uniform(3, order=2)
    schedule.save(tmp_path / "s.json")
    with pytest.raises(OptionError, match=f"order={order}: the schedule has order 2 of its own. Leave order out"):
        Options(schedule=schedule, order=order)
    for refused in (
        lambda given: Options(**given).resolved_schedule(),
        lambda given: moeca.compile(Linear(1, 1), **given),
    ):
        with pytest.raises(OptionError, match=f"order={order}: the schedule '.*s.json' has order 2 of its own"):
            refused({"schedule": str(tmp_path / "s.json"), "order": order})


def test_two_modes_that_differ_are_refused() -> None:
    with pytest.raises(OptionError, match="mode='reduce-overhead' and the option mode='max-autotune' differ"):
        Options.from_backend_options({"mode": "max-autotune"}, mode="reduce-overhead")
    assert Options.from_backend_options({"mode": "max-autotune"}, mode="max-autotune").mode == "max-autotune"


@pytest.mark.parametrize("kind", [str, Path])
def test_a_schedule_is_read_from_its_path(tmp_path: Path, kind: Any) -> None:
    schedule = Schedule.uniform(4, warmup=2)
    schedule.save(tmp_path / "s.json")
    assert Options(schedule=kind(tmp_path / "s.json")).resolved_schedule() == schedule


def test_a_schedule_that_is_not_understood_is_a_schedule_error() -> None:
    with pytest.raises(ScheduleError, match="'unifrom:3' is not understood"):
        Options(schedule="unifrom:3").resolved_schedule()


def test_options_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Options().order = 2  # type: ignore[misc]
