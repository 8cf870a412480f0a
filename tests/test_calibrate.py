"""`calibrate` end to end on a toy model: keeps its budget, tells the truth about its error, refuses bad samplers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import ScheduleError
from moeca_compile.plan.search import psnr
from moeca_compile.schedule import Action, Schedule
from tests.models import DiT

STEPS = 9


def sample(model: nn.Module, seed: int) -> Tensor:
    """Two calls a step, as with classifier-free guidance."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        t = torch.full((2,), 1000.0 * (1 - step / STEPS))
        cond, uncond = model(x, t, torch.tensor([1, 2])), model(x, t, torch.tensor([10, 10]))
        x = x - (uncond + 1.5 * (cond - uncond)) / STEPS
    return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return DiT(depth=2).eval()


@pytest.fixture(scope="module")
def found(model: nn.Module) -> Schedule:
    return moeca.calibrate(model, sample, budget="macs:0.5", inner="eager", rollouts=25, progress=False)


def test_the_schedule_keeps_its_budget_and_fits_the_steps(found: Schedule) -> None:
    assert len(found.rows) == STEPS
    assert found.period == 0
    assert found.predicted["mac_fraction"] <= 0.5
    assert found.timesteps == tuple(pytest.approx(1000.0 * (1 - step / STEPS)) for step in range(STEPS))
    assert Schedule.from_json(found.to_json()) == found
    assert set(found.rows[0]) == {Action.COMPUTE}


def test_a_run_with_it_has_the_predicted_error_and_cost(model: nn.Module, found: Schedule) -> None:
    compiled = moeca.compile(model, schedule=found, inner="eager")
    with torch.no_grad():
        truth = [sample(model, seed) for seed in (0, 1)]
        cached = [sample(compiled, seed) for seed in (0, 1)]
    with torch.no_grad():
        everything = torch.stack([sample(model, seed) for seed in (0, 1, 1000, 1001)])
    spread = float(everything.max() - everything.min())
    mse = sum(float(((a - b) ** 2).mean()) for a, b in zip(truth, cached, strict=True)) / 2
    assert psnr(mse, spread) == pytest.approx(found.predicted["psnr_db"], abs=0.01)
    stats = moeca.stats(compiled)
    assert stats.mac_fraction == pytest.approx(found.predicted["mac_fraction"], abs=1e-6)
    assert not any(record.cold for record in stats.steps)


def test_it_is_never_worse_than_a_uniform_schedule_of_that_cost(model: nn.Module) -> None:
    compiled = moeca.compile(model, schedule="uniform:2", order=1, inner="eager")
    with torch.no_grad():
        mse = sum(float(((sample(compiled, s) - sample(model, s)) ** 2).mean()) for s in (0, 1)) / 2
    budget = f"macs:{moeca.stats(compiled).mac_fraction + 1e-6}"
    found = moeca.calibrate(model, sample, budget=budget, inner="eager", rollouts=25, progress=False, data_range=1.0)
    assert psnr(mse, 1.0) <= found.predicted["psnr_db"] + 1e-6


def test_a_quality_budget_gives_the_cheapest_schedule_that_holds_it(model: nn.Module) -> None:
    found = moeca.calibrate(model, sample, budget="psnr:40", inner="eager", rollouts=30, progress=False)
    assert found.predicted["psnr_db"] >= 40
    assert found.predicted["mac_fraction"] < 1


def test_a_latency_budget_is_measured(model: nn.Module) -> None:
    found = moeca.calibrate(model, sample, budget="latency:0.8", inner="eager", rollouts=10, progress=False)
    assert len({*found.rows}) >= 2


def test_bad_samplers_and_seeds_are_refused(model: nn.Module) -> None:
    noise = iter(range(100))
    with pytest.raises(ScheduleError, match="two results for one seed"):
        moeca.calibrate(model, lambda m, seed: sample(m, next(noise)), budget="macs:0.5", inner="eager")
    with pytest.raises(ScheduleError, match="never called the model"):
        moeca.calibrate(model, lambda m, seed: torch.zeros(1), budget="macs:0.5", inner="eager")
    with pytest.raises(ScheduleError, match="alike"):
        moeca.calibrate(model, lambda m, seed: sample(m, 0), budget="macs:0.5", inner="eager")
    with pytest.raises(ScheduleError, match="finite"):
        moeca.calibrate(model, lambda m, seed: sample(m, seed) * torch.nan, budget="macs:0.5", inner="eager")
    with pytest.raises(ScheduleError, match="both"):
        moeca.calibrate(model, sample, budget="macs:0.5", seeds=(1,), holdout=(1,))


def test_calibrating_leaves_no_plan_behind_for_an_equal_compile(model: nn.Module, found: Schedule) -> None:
    """Equal options are one compiled graph for torch: it must run its own schedule, not the search's last one."""
    uniform = Schedule.uniform(2, order=1)
    compiled = moeca.compile(model, schedule=uniform, inner="eager")
    with torch.no_grad():
        sample(compiled, 0)
    ran = [record.variant for record in moeca.stats(compiled).steps if record.stream == "0"]
    assert len(set(ran)) == 2
    assert ran == [
        ran[0] if uniform.rows[uniform.row_index(s) or 0][0] is Action.COMPUTE else ran[1] for s in range(STEPS)
    ]
