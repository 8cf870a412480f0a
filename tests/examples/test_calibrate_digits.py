"""The committed schedules: they fit the digits model and do what they predict; the example runs in its short form."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from examples import digits
from moeca_compile.schedule import Schedule

calibrate = importlib.import_module("examples.03_calibrate")


@pytest.fixture(scope="module")
def model() -> digits.DiTMoE:
    return digits.load_model()


@pytest.fixture(scope="module")
def truth(model: digits.DiTMoE) -> Tensor:
    full = moeca.compile(model, schedule="full", inner="eager")
    with torch.no_grad():
        return torch.cat([calibrate.sampler()(full, seed) for seed in calibrate.HOLDOUT])


@pytest.mark.slow  # 400 steps of the digits model and as many cached ones
@pytest.mark.parametrize("name", calibrate.BUDGETS)
def test_a_committed_schedule_holds_what_it_predicts(model: digits.DiTMoE, truth: Tensor, name: str) -> None:
    schedule = Schedule.load(calibrate.SCHEDULES / f"digits_{name}.json")
    assert schedule.predicted["mac_fraction"] <= calibrate.BUDGETS[name]
    torch._dynamo.reset()
    compiled = moeca.compile(model, schedule=schedule, inner="eager")
    with torch.no_grad():
        images = torch.cat([calibrate.sampler()(compiled, seed) for seed in calibrate.HOLDOUT])
    stats = moeca.stats(compiled)
    assert stats.mac_fraction == pytest.approx(schedule.predicted["mac_fraction"], abs=1e-6)
    assert not any(step.cold for step in stats.steps)
    quality = digits.psnr(images, truth).mean().item()
    assert quality == pytest.approx(schedule.predicted["psnr_db_holdout"], abs=1)


@pytest.mark.slow
def test_a_committed_schedule_is_good_at_half_its_steps(model: digits.DiTMoE) -> None:
    qualities = {}
    with torch.no_grad():
        truth = digits.sample(model, 0, 4, steps=25)
        for schedule in ("uniform:3:warmup=10", str(calibrate.SCHEDULES / "digits_34.json")):  # of equal cost
            compiled = moeca.compile(model, schedule=schedule, inner="eager")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "step 1 is at timestep 960, but the schedule has 980")
                qualities[schedule] = digits.psnr(digits.sample(compiled, 0, 4, steps=25), truth).mean().item()
            assert moeca.stats(compiled).mac_fraction == pytest.approx(0.6, abs=0.01)
    uniform, calibrated = qualities.values()
    assert calibrated > max(uniform, 50)


def test_a_committed_schedule_is_refused_by_another_model() -> None:
    schedule = Schedule.load(calibrate.SCHEDULES / "digits_34.json")
    with pytest.raises(moeca.MoecaError, match="the schedule is for another graph"):
        schedule.bind(("blocks.0.attn",), "")


@pytest.mark.slow
def test_the_example_finds_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate.main(["--out", str(tmp_path / "found.json")])
    found = Schedule.load(tmp_path / "found.json")
    assert len(found.rows) == 50
    assert found.predicted["mac_fraction"] <= 0.3443
    assert "PSNR on other seeds" in capsys.readouterr().out
