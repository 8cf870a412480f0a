"""Calibrated multistep: its weights by hand, its placement against all placements, its fit where a fit can be exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peers import solvers
from benchmarks.peers.equal import multistep
from benchmarks.peers.equal.multistep import euler_sum, integral


def swirl(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    return torch.sin(3 * x) + t, x


def velocity(x: Tensor, t: float) -> Tensor:
    return swirl(x, t)[0]


START = torch.linspace(-1, 1, 6, dtype=torch.float64)


@pytest.mark.parametrize(("order", "solver"), [(0, solvers.euler), (1, solvers.adams_bashforth)])
def test_on_every_step_it_is_the_known_solver(order: int, solver: solvers.Solver) -> None:
    rule = multistep.polynomial(range(8), 8, order, integral)
    torch.testing.assert_close(rule.sample(swirl, START), solver(velocity, START, 8))


def test_a_forecast_of_the_output_is_what_eulers_loop_would_sum() -> None:
    """Outputs 2 at step 3 and 1 at step 1: the line through them gives 2, 2.5, 3 at steps 3, 4, 5."""
    newest, oldest = multistep.weights_of((3, 1), 3, 6, euler_sum)
    assert 2 * newest + 1 * oldest == pytest.approx(2 + 2.5 + 3)


def test_the_integral_of_a_parabola_is_exact() -> None:
    """v = s^2 at steps 0, 1 and 3, from 3 to 5."""
    weights = multistep.weights_of((3, 1, 0), 3, 5, integral)
    assert weights[0] * 9 + weights[1] * 1 == pytest.approx((125 - 27) / 3)


def test_placing_finds_the_best_of_all_placements() -> None:
    outputs = np.random.default_rng(0).normal(size=(9, 20)).cumsum(0)
    gram = outputs @ outputs.T

    def error(at: tuple[int, ...]) -> float:
        difference = np.full(9, -1.0)
        for known, start, stop in multistep.moves(at, 9, 1):
            difference[list(known)] += multistep.weights_of(known, start, stop, euler_sum)
        return float(difference @ gram @ difference)

    least = min(((0, *rest) for rest in itertools.combinations(range(1, 9), 3)), key=error)
    assert tuple(multistep.place(gram, 4, 1, euler_sum)) == least


def test_a_placement_is_the_same_again_and_keeps_to_its_stride() -> None:
    outputs = np.random.default_rng(1).normal(size=(12, 20))
    gram = outputs @ outputs.T
    placed = multistep.place(gram, 4, 1, euler_sum, stride=2)
    assert placed == multistep.place(gram, 4, 1, euler_sum, stride=2)
    assert placed[0] == 0
    assert len(placed) == 4
    assert all(step % 2 == 0 for step in placed)


def test_fitted_weights_end_on_states_that_they_can_reach() -> None:
    """The velocity is linear in x, and so is each state; the same rule holds for other noise."""

    def decay(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return 0.5 * x, x

    states = [START * (1 - 0.5 / 8) ** step for step in range(9)]
    rule = multistep.fitted((0, 3, 6), decay, states)
    torch.testing.assert_close(rule.sample(decay, 2 * START), 2 * states[-1], rtol=1e-5, atol=1e-6)
