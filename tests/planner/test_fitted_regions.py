"""Schedules of regions get fitted weights where rollouts find them better, and only there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.planner.refine import fitted_regions
from moeca_compile.planner.search.weights import FittedForecasts
from moeca_compile.schedule import Schedule
from tests.models import DiT
from tests.test_calibrate import QUICK, mean_psnr, sample

HELD_OUT = range(2000, 2004)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return DiT(depth=1).eval()


def calibrated(model: nn.Module, **others: Any) -> Schedule:
    return moeca.calibrate(model, sample, **{"budget": "macs:0.5", **QUICK, **others})


def quality(model: nn.Module, schedule: Schedule, seeds: range) -> float:
    compiled = moeca.compile(model, schedule=schedule, inner="eager")
    with torch.no_grad():
        truth, cached = [sample(model, seed) for seed in seeds], [sample(compiled, seed) for seed in seeds]
    return mean_psnr(cached, truth)


def test_fitted_weights_are_nearer_on_other_seeds_too(model: nn.Module) -> None:
    found = calibrated(model)
    assert found.fitted is not None
    assert "fitted weights" in found.made_by
    (tried,) = [value for name, value in found.predicted.items() if name.endswith("fitted weights")]
    assert tried == found.predicted["psnr_db"]
    assert Schedule.from_json(found.to_json()) == found
    polynomial = quality(model, replace(found, fitted=None), HELD_OUT)
    assert quality(model, found, HELD_OUT) > polynomial + 1


def test_rows_that_compute_some_regions_have_weights_for_the_others(model: nn.Module) -> None:
    found = calibrated(model, budget="macs:0.35", seeds=4)
    assert found.fitted is not None
    assert len(found.distinct_rows()) > 2
    for row, cells in zip(found.rows, found.fitted.weights, strict=True):
        assert all(not cell or action.name == "FORECAST" for action, cell in zip(row, cells, strict=True))


@pytest.mark.parametrize("budget", ["macs:0.5,state:1MiB", "macs:0.5,state:20KiB"])
def test_a_limit_on_the_state_keeps_as_many_values_as_the_polynomial(model: nn.Module, budget: str) -> None:
    found = calibrated(model, budget=budget)
    assert all(found.depth(column) <= found.order + 1 for column in range(len(found.rows[0])))
    if "KiB" in budget:
        assert found.predicted["state_bytes"] <= 20 * 2**10


def test_weights_that_are_not_better_are_not_taken(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(drift: Any, plan: Any, kinds: Any, most: int) -> FittedForecasts:
        row = tuple((0.0, 0.0) for _ in kinds["C"])
        history, rows = 0, []
        for letter in plan.letters:
            history += letter == "C"
            rows.append(row if letter != "C" and history > 1 else tuple(() for _ in row))
        return FittedForecasts(tuple(rows), 100.0, 0.0)

    monkeypatch.setattr(fitted_regions, "fitted_forecasts", worse)
    found = calibrated(model, max_variants=2)
    assert found.fitted is None
    assert found.predicted["tried order-2, fitted weights"] < found.predicted["psnr_db"]


def test_nothing_is_fitted_where_samples_are_compared_with_given_ones(model: nn.Module) -> None:
    given: dict[int, Tensor] = {seed: sample(model, seed) for seed in (0, 1)}
    found = calibrated(model, truth=given, holdout=0)
    assert found.fitted is None
    assert not any("fitted weights" in name for name in found.predicted)
