"""The solvers converge with the order that they claim, in as many calls as steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.peers import solvers

ALL = (solvers.euler, solvers.adams_bashforth, solvers.dpm_solver)


@pytest.mark.parametrize(("solver", "order"), [(solvers.euler, 1), (solvers.adams_bashforth, 2)])
def test_halving_the_step_divides_the_error_as_the_order_says(solver: solvers.Solver, order: int) -> None:
    """dx/dt = x from t = 1 to 0 gives x/e."""

    def error(steps: int) -> float:
        made = solver(lambda x, t: x, torch.ones(1, dtype=torch.float64), steps)
        return abs(made.item() - math.exp(-1))

    assert error(40) / error(80) == pytest.approx(2**order, rel=0.15)


# diffusers hands torch tensors to numpy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dpm_solver_is_that_of_diffusers() -> None:
    """On its grid, which starts at 0.999; the velocity is neither linear nor the same at all times."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed: pip install -e '.[bench]'")
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(10)
    times = scheduler.sigmas.double().tolist()

    def velocity(x: Tensor, t: float) -> Tensor:
        return torch.sin(3 * x) + t

    start = x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for t, timestep in zip(times, scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(x, t), timestep, x).prev_sample
    torch.testing.assert_close(solvers.dpm_solver_over(velocity, start, times), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ALL)
def test_a_straight_flow_is_exact_in_one_call_a_step(solver: solvers.Solver) -> None:
    """All solvers are exact where noise and image are joined by a line."""
    image, noise, calls = torch.tensor([0.3, -0.8]), torch.tensor([1.2, 0.4]), []

    def velocity(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return noise - image

    torch.testing.assert_close(solver(velocity, noise, 7), image)
    assert calls == pytest.approx([1 - step / 7 for step in range(7)])
