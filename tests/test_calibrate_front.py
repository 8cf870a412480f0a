"""`calibrate_front` and `Front`: several budgets from one set of measurements, one file, a choice by budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, OptionError, ScheduleError
from moeca_compile.schedule import Action, Schedule
from tests.models import DiT
from tests.test_calibrate import QUICK, sample

BUDGETS = ["macs:0.8", "macs:0.01", "macs:0.5", "macs:0.35"]  # the second one can't be kept


class CountedCalls:
    """A sampler that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, model: nn.Module, seed: int) -> Tensor:
        self.runs += 1
        return sample(model, seed)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return DiT(depth=1).eval()


@pytest.fixture(scope="module")
def sampler() -> CountedCalls:
    return CountedCalls()


@pytest.fixture(scope="module")
def front(model: nn.Module, sampler: CountedCalls) -> moeca.Front:
    with pytest.warns(MoecaWarning, match=r"leaves a budget out: budget macs:0.01 can't be kept: the nearest"):
        return moeca.calibrate_front(model, sampler, budgets=BUDGETS, holdout=1, **QUICK)


def test_each_schedule_is_the_one_of_its_budget_alone_and_measurements_are_shared(
    front: moeca.Front, sampler: CountedCalls, model: nn.Module
) -> None:
    fractions = [schedule.predicted["mac_fraction"] for schedule in front]
    assert fractions == sorted(fractions)
    assert all(fraction <= limit for fraction, limit in zip(fractions, (0.35, 0.5, 0.8), strict=True))
    counted = CountedCalls()
    alone = moeca.calibrate(model, counted, budget="macs:0.5", holdout=1, **QUICK)
    middle = front.at("macs:0.5")
    assert middle.rows == alone.rows
    assert middle.predicted["psnr_db"] == pytest.approx(alone.predicted["psnr_db"])
    assert sampler.runs < 3 * counted.runs - 6  # the uncached runs and the measurement are made once
    assert len({schedule.predicted["trajectories"] for schedule in front}) == 1
    assert front.at("macs:0.5").predicted["trajectories"] > alone.predicted["trajectories"]


def test_a_file_holds_all_and_one_is_chosen_by_budget(front: moeca.Front, model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "front.json"
    front.save(file)
    assert moeca.Front.load(file) == front
    assert len(front) == 3
    chosen = front.at("speedup:2")
    assert Schedule.parse(f"{file}@speedup:2") == chosen == front.at("macs:0.5")
    compiled = moeca.compile(model, schedule=f"{file}@speedup:2", inner="eager")
    with torch.no_grad():
        sample(compiled, 5)
    assert moeca.stats(compiled).mac_fraction == pytest.approx(chosen.predicted["mac_fraction"], abs=1e-3)
    with pytest.raises(ScheduleError, match=r"is a front of several schedules: name one by a budget"):
        Schedule.load(file)
    with pytest.raises(OptionError, match=r"order=[12]: the schedule '.*front.json@speedup:2' has order"):
        moeca.compile(model, schedule=f"{file}@speedup:2", order=2 if chosen.order != 2 else 1, inner="eager")


def test_a_budget_chooses_by_quality_and_a_quality_by_cost() -> None:
    rows = ((Action.COMPUTE,), (Action.FORECAST,))

    def schedule(macs: float, psnr: float, state: float = 10.0, **more: float) -> Schedule:
        return Schedule(rows, predicted={"mac_fraction": macs, "psnr_db": psnr, "state_bytes": state, **more})

    cheap, better, dear = schedule(0.2, 40.0), schedule(0.3, 44.0, 50.0), schedule(0.4, 43.0, latency_fraction=0.7)
    front = moeca.Front((dear, cheap, better))
    assert front.schedules == (cheap, better, dear)
    assert front.at("macs:0.5") == better
    assert front.at("psnr:42") == better
    assert front.at("psnr:30") == cheap
    assert front.at("macs:0.5,state:20") == dear
    assert front.at("speedup:5") == cheap  # by the MACs, where no latency was measured
    assert front.at("latency:0.35") == better
    for budget in ("macs:0.1", "psnr:50", "macs:0.5,state:1"):
        with pytest.raises(ScheduleError, match=r"keeps .*; it has macs:0.200 with 40.0 dB, macs:0.300 with 44.0"):
            front.at(budget)
    converged = replace(cheap, predicted={**cheap.predicted, "psnr_db_converged_holdout": 60.0})
    assert moeca.Front((converged, better)).at("macs:0.5") == converged


@pytest.mark.slow
def test_a_front_of_nothing_says_why(model: nn.Module) -> None:
    with pytest.raises(ScheduleError, match=r"no budget can be kept. budget macs:0.01 can't be kept: the nearest"):
        moeca.calibrate_front(model, sample, budgets=["macs:0.01"], holdout=0, **QUICK)


def test_bad_arguments_are_refused_before_anything_runs() -> None:
    model = nn.Linear(1, 1)
    for budgets in ("macs:0.5", []):
        with pytest.raises(ScheduleError, match=r"expected several texts such as"):
            moeca.calibrate_front(model, sample, budgets=budgets)
    with pytest.raises(ScheduleError, match=r"budget 'mac:0.3': expected macs:0.26"):
        moeca.calibrate_front(model, sample, budgets=["macs:0.5", "mac:0.3"])
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'seed'"):
        moeca.calibrate_front(model, sample, budgets=["macs:0.5"], seed=3)
    with pytest.raises(ScheduleError, match=r"aren't all finite"):
        moeca.calibrate_front(
            DiT(depth=1).eval(), lambda m, s: sample(m, s) * float("nan"), budgets=["macs:0.5"], **QUICK
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"format": "moeca-schedule"}', r"format is 'moeca-schedule', expected 'moeca-front'"),
        ('{"format": "moeca-front", "version": 2}', r"version 2 is not the one that this package reads \(1\)"),
        ('{"format": "moeca-front", "version": 1, "schedules": 3}', r"schedules is 3, expected a list of schedules"),
        ('{"format": "moeca-front", "version": 1, "schedules": []}', r"a front needs at least one schedule"),
        ('{"format": "moeca-front", "version": 1, "schedules": [{}]}', r"schedules\[0\].format is missing"),
        ('{"format": "moeca-front", "version": 1, "schedules": [], "more": 1}', r"it has unknown entries"),
        ("[", r"front .*x.json': not a readable front"),
    ],
)
def test_a_damaged_file_is_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ScheduleError, match=says):
        moeca.Front.load(file)


def test_a_front_needs_costs_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"need predicted\['mac_fraction'\]; 'full' has none"):
        moeca.Front((Schedule.full(),))
    front = moeca.Front((replace(Schedule.full(), predicted={"mac_fraction": 1.0}),))
    with pytest.raises(ScheduleError, match=r"front .* can't be written"):
        front.save(tmp_path / "none" / "x.json")


@pytest.mark.slow
def test_a_quality_function_decides_in_place_of_the_psnr(model: nn.Module) -> None:
    calls: list[tuple[int, ...]] = []

    def lowest_sample(samples: Tensor, wanted: Tensor) -> Tensor:
        calls.append(tuple(samples.shape))
        return -20 * (samples - wanted).abs().amax(dim=(1, 2, 3)).log10()

    found = moeca.calibrate(model, sample, budget="macs:0.5", quality=lowest_sample, holdout=1, **QUICK)
    assert set(calls) == {(2, 4, 8, 8)}
    assert "psnr_db" not in found.predicted
    model_with_it = moeca.compile(model, schedule=found, inner="eager")
    with torch.no_grad():
        qualities = [lowest_sample(sample(model_with_it, seed), sample(model, seed)) for seed in (0, 1)]
    assert found.predicted["quality"] == pytest.approx(float(torch.cat(qualities).mean()), abs=1e-3)
    assert moeca.Front((found,)).at(f"psnr:{found.predicted['quality_holdout'] - 1}") == found


@pytest.mark.parametrize(
    ("quality", "says"),
    [
        (3.0, r"quality=3.0, expected a function \(samples, wanted\)"),
        (lambda samples, wanted: 1.0, r"expected one number for each of the 2 samples"),
        (lambda samples, wanted: [1.0, float("nan")], r"expected one number for each of the 2 samples, not NaN"),
    ],
)
def test_a_quality_that_gives_no_numbers_is_refused(model: nn.Module, quality: object, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        moeca.calibrate(model, sample, budget="macs:0.5", quality=quality, **QUICK)


@pytest.mark.slow
def test_a_folder_of_another_quality_is_refused(model: nn.Module, tmp_path: Path) -> None:
    moeca.calibrate(model, sample, budget="macs:0.5", resume=tmp_path, holdout=0, **QUICK)
    with pytest.raises(ScheduleError, match=r"quality is None there, '.*squared' here"):
        moeca.calibrate(model, sample, budget="macs:0.5", resume=tmp_path, holdout=0, quality=squared, **QUICK)


def squared(samples: Tensor, wanted: Tensor) -> Tensor:
    return -10 * (samples - wanted).square().mean(dim=(1, 2, 3)).log10()


def test_a_budget_that_only_the_stack_keeps_may_follow_another() -> None:
    """The stack has borrowed the samples of the first search, and measures its own drift."""
    torch.manual_seed(0)
    options = QUICK | {"granularity": "auto", "holdout": 0}
    front = moeca.calibrate_front(DiT(depth=2).eval(), sample, budgets=["macs:0.5", "macs:0.5,state:8KiB"], **options)
    assert front.at("macs:0.5,state:8KiB").predicted["state_bytes"] <= 8 * 2**10
