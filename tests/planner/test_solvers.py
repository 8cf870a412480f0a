"""Calibrated under one solver, run under it, another one, or with another number of steps: diffusers' schedulers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from moeca_compile.schedule import Schedule
from tests.models import DiT

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' own, with numpy 2

STEPS = 10
Sampler = Callable[[Any, int], Tensor]
SLOW = ("DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "PNDMScheduler")
TWICE = ("PNDMScheduler", "HeunDiscreteScheduler")  # they visit a timestep twice: each call is a step of a named stream


def sampler(name: str, steps: int = STEPS) -> Sampler:
    """The usual loop around a diffusers scheduler; noise of a stochastic one comes from the seed's generator."""

    def sample(model: Any, seed: int) -> Tensor:
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(steps)
        noise = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 4, 8, 8, generator=noise) * getattr(scheduler, "init_noise_sigma", 1.0)
        own = {"generator": noise} if name == "DDPMScheduler" else {}
        compiled = isinstance(model, torch._dynamo.OptimizedModule)
        # the toy's latents leap, so that the clock is told where a trajectory begins
        stream = "all" if name in TWICE else None
        with moeca.trajectory(model, stream=stream) if compiled else nullcontext():
            for t in scheduler.timesteps:
                given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                out = model(given, t.float().expand(2), torch.tensor([1, 2]))
                x = scheduler.step(out, t, x, **own).prev_sample
        return x

    return sample


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """One network compiled again and again meets torch's recompile limit."""
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return DiT(depth=1, dim=16).eval()


def found_under(model: nn.Module, name: str) -> Schedule:
    return moeca.calibrate(
        model, sampler(name), budget="macs:0.6", granularity="region", order=1, seeds=(0, 1), holdout=0,
        effort=4, inner="eager", progress=False,
    )  # fmt: skip


def run(model: nn.Module, schedule: Schedule, sample: Sampler, seed: int = 5) -> tuple[float, Any]:
    """Relative error against the uncached samples, and what ran."""
    compiled = moeca.compile(model, schedule=schedule, inner="eager")
    return error_of(compiled, model, sample, seed), moeca.stats(compiled)


@torch.no_grad()
def error_of(compiled: Any, model: nn.Module, sample: Sampler, seed: int = 5) -> float:
    cached, true = sample(compiled, seed), sample(model, seed)
    return float((cached - true).norm() / true.norm())


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("HeunDiscreteScheduler", *SLOW)),
    ],
)
@pytest.mark.slow
def test_each_solver_is_calibrated_and_runs_as_predicted(model: nn.Module, name: str) -> None:
    schedule = found_under(model, name)
    error, stats = run(model, schedule, sampler(name))
    assert len(schedule.rows) == len(stats.steps)
    assert stats.mac_fraction == pytest.approx(schedule.predicted["mac_fraction"], abs=1e-6)
    assert stats.mac_fraction <= 0.6
    assert not any(step.cold for step in stats.steps)
    assert bool(schedule.timesteps) == (name not in TWICE)
    lazy = Schedule.uniform(99, order=0)  # the first step only
    assert error < run(model, lazy, sampler(name))[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*the schedule's fitted weights aren't used")  # the polynomial's serve
def test_rows_go_by_timestep_under_another_solver_or_number_of_steps(model: nn.Module) -> None:
    schedule = found_under(model, "DDIMScheduler")
    lazy = moeca.compile(model, schedule=Schedule.uniform(99, order=0), inner="eager")  # the first step only
    for name, steps in (("DPMSolverMultistepScheduler", STEPS), ("DDIMScheduler", 7), ("DDIMScheduler", 20)):
        with pytest.warns(MoecaWarning, match="made for another sampler"):
            error, stats = run(model, schedule, sampler(name, steps))
        assert len(stats.steps) == steps
        assert stats.mac_fraction <= 0.61 if steps >= STEPS else 0.6 < stats.mac_fraction < 1
        assert not any(step.cold for step in stats.steps[1:])
        assert error < error_of(lazy, model, sampler(name, steps))


@pytest.mark.slow
def test_timesteps_that_are_not_the_schedules_are_warned_of(model: nn.Module) -> None:
    schedule = found_under(model, "FlowMatchEulerDiscreteScheduler")
    shifted = [1900.0 - 100 * step for step in range(STEPS)]

    def sample(net: Any, seed: int) -> Tensor:
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for t in shifted:
            x = x - net(x, torch.full((2,), t), torch.tensor([1, 2])) / STEPS
        return x

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, schedule, sample)
    assert [
        str(one.message)
        for one in caught
        if one.category is MoecaWarning and "made for another sampler" in str(one.message)
    ]
