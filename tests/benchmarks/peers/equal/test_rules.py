"""Forecasts in the sampler and solvers of others: their weights by hand, their steps against all choices of steps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peers import solvers
from benchmarks.peers.equal import dpcache, multistep, schedulers, spectrum
from benchmarks.peers.equal.multistep import euler_sum

START = torch.linspace(-1, 1, 6, dtype=torch.float64)


def decay(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    return x * (1 + t), x


def gram_of(steps: int, seed: int = 0) -> np.ndarray:
    outputs = np.random.default_rng(seed).normal(size=(steps, 20)).cumsum(0)
    return np.asarray(outputs @ outputs.T)


def test_a_forecast_from_every_step_is_eulers_method() -> None:
    weigh = spectrum.weigher(8, 3, 0.1, 0.5)
    rule = multistep.forecast(range(8), 8, weigh)
    torch.testing.assert_close(rule.sample(decay, START), solvers.euler(lambda x, t: decay(x, t)[0], START, 8))
    assert multistep.surrogate(rule, gram_of(8)) == pytest.approx(0, abs=1e-12)


def test_the_surrogate_is_the_error_where_outputs_dont_answer_to_x() -> None:
    outputs = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)

    def recorded(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return outputs[round(8 * (1 - t))], x

    rule = multistep.polynomial((0, 3, 5), 8, 1, euler_sum)
    error = (rule.sample(recorded, START) - (START - outputs.sum(0) / 8)).square().sum()
    found = multistep.surrogate(rule, (outputs @ outputs.T).numpy()) / 64
    assert found == pytest.approx(float(error))


def test_a_regression_follows_what_its_polynomials_can_and_never_drifts_without_bound() -> None:
    weigh = spectrum.weigher(20, 2, 1e-9, 0.0)
    known = (12, 9, 5, 2, 0)
    parabola = np.array([float(step**2) for step in known])
    assert weigh(known, 15) @ parabola == pytest.approx(15**2, rel=1e-4)
    assert weigh(known, 12) == pytest.approx([1, 0, 0, 0, 0])
    assert weigh((0,), 3) == pytest.approx([1])


@pytest.mark.parametrize("count", [10, 13, 17, 25])
@pytest.mark.parametrize("warmup", [2, 3, 5])
def test_computed_steps_get_rarer(count: int, warmup: int) -> None:
    at = spectrum.growing(50, count, warmup)
    assert at[:warmup] == list(range(warmup))
    assert count - 1 <= len(at) <= count
    gaps = [after - before for before, after in itertools.pairwise([*at, 50])]
    assert gaps[warmup] <= gaps[-2] + 1


def test_the_path_is_the_cheapest_of_all() -> None:
    cost = dpcache.of_forecasts(gram_of(9))

    def total(at: tuple[int, ...]) -> float:
        return sum(
            float(cost[older, newer, after])
            for older, newer, after in zip((0, *at[:-1]), at, (*at[1:], 9), strict=True)
        )

    best = min(((0, *rest) for rest in itertools.combinations(range(1, 9), 3)), key=total)
    assert tuple(dpcache.path(cost, 4)) == best


def test_a_forecasts_cost_is_its_squared_error() -> None:
    """Outputs 0, 1, 4, 9 of one number: the line from steps 0 and 1 gives 2 and 3."""
    outputs = np.array([[0.0], [1.0], [4.0], [9.0]])
    cost = dpcache.of_forecasts(outputs @ outputs.T)
    assert cost[0, 1, 4] == pytest.approx(2**2 + 6**2)
    assert cost[0, 0, 2] == pytest.approx(1)  # the first output is kept


def test_steps_cost_nothing_where_their_order_is_exact() -> None:
    """v = START for order 0; v = START (1 + t) for order 1, whose first step alone is off."""
    straight = [START * (1 - step / 5) for step in range(6)]
    cost = dpcache.of_steps(straight, [START] * 5, 0)
    assert cost[np.isfinite(cost)].max() == pytest.approx(0, abs=1e-20)
    times = [1 - step / 5 for step in range(6)]
    bent = [START * (time + time**2 / 2) for time in times]
    cost = dpcache.of_steps(bent, [START * (1 + time) for time in times[:-1]], 1)
    assert cost[0, 0, 2] > 1e-4
    later = cost[:, 1:]
    assert later[np.isfinite(later)].max() == pytest.approx(0, abs=1e-20)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("sampler", [schedulers.unipc, schedulers.dpm])
def test_solvers_of_diffusers_come_to_the_exact_solution(sampler: schedulers.Sampler) -> None:
    """dx/dt = x (1 + t) from t = 1 to 0 shrinks x by exp(-1.5); a gentler grid at both ends helps."""
    pytest.importorskip("diffusers", reason="diffusers isn't installed: pip install -e '.[bench]'")
    exact = START * math.exp(-1.5)
    errors = []
    for count in (8, 32):
        sigmas = [1 - step / count for step in range(count)]
        errors.append((sampler(sigmas, 3)(decay, START.float()[None]) - exact).norm() / exact.norm())
    euler = (solvers.euler(lambda x, t: decay(x, t)[0], START, 32) - exact).norm() / exact.norm()
    assert errors[1] < errors[0]
    assert errors[1] < 0.3 * euler
