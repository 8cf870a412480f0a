"""Fitted weights of regions as people run them: where they serve, where the polynomial does, and what is said then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.fitted import FittedWeights
from tests.models import DiT
from tests.tools import row

TIMES = (900.0, 800.0, 700.0, 600.0, 500.0)
ROWS = ("CC", "CC", "FF", "RC", "FF")
REGIONS = ("blocks.0", "blocks.0.moe")


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    return (
        DiT(depth=1, dim=8, heads=2, num_experts=3, top_k=2, hidden=6, size=4, channels=2).eval().requires_grad_(False)
    )


def sample(handle: Any, times: Sequence[float] = TIMES) -> list[Tensor]:
    x, outputs = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        for time in times:
            outputs.append(handle(x, torch.full((2,), time), torch.tensor([1, 2])))
            x = x - 0.1 * outputs[-1]
    return outputs


def schedule_for(weights: Sequence[Sequence[Sequence[float]]] | None, timesteps: Any = ()) -> Schedule:
    fitted = None if weights is None else FittedWeights(tuple(tuple(map(tuple, step)) for step in weights))
    return Schedule(tuple(map(row, ROWS)), REGIONS, fitted=fitted, timesteps=timesteps, granularity="region")


def run(model: DiT, schedule: Schedule, times: Sequence[float] = TIMES) -> list[Tensor]:
    return sample(moeca.compile(model, schedule=schedule, inner="eager"), times)


def filled(forecasts: Sequence[Sequence[float]]) -> list[list[Sequence[float]]]:
    """Weights of the two steps that forecast."""
    first, last = forecasts
    return [[(), ()], [(), ()], [first, first], [(), ()], [last, last]]


@pytest.mark.slow
def test_the_polynomial_written_as_weights_is_the_polynomial(model: DiT) -> None:
    weights = [[(), ()], [(), ()], [(2.0, -1.0), (2.0, -1.0)], [(), ()], [(4.0, -3.0), (1.5, -0.5)]]
    plain, fitted = (run(model, schedule_for(values)) for values in (None, weights))
    for left, right in zip(plain, fitted, strict=True):
        assert torch.equal(left, right)


def test_weights_make_a_step_that_no_polynomial_makes(model: DiT) -> None:
    plain, fitted = (run(model, schedule_for(values)) for values in (None, filled([(0.5, 0.1), (0.5,)])))
    assert torch.equal(plain[1], fitted[1])
    assert not torch.equal(plain[2], fitted[2])


def test_one_program_serves_every_set_of_weights(model: DiT) -> None:
    handle = moeca.compile(model, schedule=schedule_for(filled([(0.5, 0.1), (0.2, 0.3)])), inner="eager")
    sample(handle)
    assert len({record.variant for record in moeca.stats(handle).steps if record.step in (2, 4)}) == 1


def test_at_other_timesteps_the_polynomial_serves_and_it_is_said_once(model: DiT) -> None:
    schedule = schedule_for(filled([(0.5, 0.1), (0.2, 0.3)]), TIMES)
    times = (900.0, 800.0, 740.0, 600.0, 500.0)
    with pytest.warns(MoecaWarning) as shown:
        found = run(model, schedule, times)
    said = [str(one.message) for one in shown if "fitted weights aren't used" in str(one.message)]
    assert len(said) == 1
    assert "the call comes at another step or timestep" in said[0]
    with pytest.warns(MoecaWarning, match="made for another sampler"):
        polynomial = run(model, replace(schedule, fitted=None), times)
    assert all(map(torch.equal, found, polynomial))


@pytest.mark.slow
def test_after_another_history_the_polynomial_serves_and_it_is_said(model: DiT) -> None:
    """Step 1 overflows, so that step 2 is computed in full: what step 4 forecasts from are other steps."""
    schedule = schedule_for(filled([(0.5, 0.1), (0.2, 0.3)]))
    results = []
    for one in (schedule, replace(schedule, fitted=None)):
        handle = moeca.compile(model, schedule=one, inner="eager")
        x, y = torch.ones(2, 2, 4, 4), torch.tensor([1, 2])
        with torch.no_grad(), moeca.trajectory(handle, steps=5):
            handle(x, torch.full((2,), TIMES[0]), y)
            handle(torch.full_like(x, float("nan")), torch.full((2,), TIMES[1]), y)
            with pytest.warns(MoecaWarning) as shown:
                results.append([handle(x, torch.full((2,), time), y) for time in TIMES[2:]])
        said = [str(record.message) for record in shown]
        assert any("the steps that computed the model before are others" in text for text in said) == (one is schedule)
    assert all(map(torch.equal, *results))
