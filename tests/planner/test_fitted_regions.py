"""Schedules of regions get fitted weights where rollouts find them better, and only there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
Sampler = Callable[[nn.Module, int], Tensor]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return DiT(depth=1).eval()


def calibrated(model: nn.Module, **others: Any) -> Schedule:
    return moeca.calibrate(model, sample, **{"budget": "macs:0.5", **QUICK, **others})


def quality(model: nn.Module, schedule: Schedule, seeds: range, drawn: Sampler = sample) -> float:
    compiled = moeca.compile(model, schedule=schedule, inner="eager")
    with torch.no_grad():
        truth, cached = [drawn(model, seed) for seed in seeds], [drawn(compiled, seed) for seed in seeds]
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


def test_a_run_has_the_predicted_error(model: nn.Module) -> None:
    """On seeds that the search has not seen."""
    found = calibrated(model)
    assert quality(model, found, range(1000, 1002)) == pytest.approx(found.predicted["psnr_db_holdout"], abs=0.02)


@pytest.mark.filterwarnings("ignore:the schedule finds its rows by timestep", "ignore:.*fitted weights aren.t used")
def test_weights_that_a_sampler_can_not_use_are_not_taken(model: nn.Module) -> None:
    """Samples of one call are at different timesteps, so that no call is at a timestep of the schedule."""

    def mixed(net: nn.Module, seed: int) -> Tensor:
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for step in range(9):
            t = 1000.0 * (1 - step / 9) - torch.tensor([0.0, 5.0])
            x = x - net(x, t, torch.tensor([1, 2])) / 9
        return x

    found = moeca.calibrate(model, mixed, **{"budget": "macs:0.5", **QUICK})
    used = quality(model, found, range(1000, 1002), mixed)
    assert used == pytest.approx(found.predicted["psnr_db_holdout"], abs=0.02)


def test_graphs_of_other_batches_are_cached_in_rollouts_too(model: nn.Module) -> None:
    def halves(net: nn.Module, seed: int) -> Tensor:
        x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for step in range(9):
            t = torch.full((3,), 1000.0 * (1 - step / 9))
            uncond = net(x, t, torch.tensor([10, 10, 10]))
            cond = net(x[:2], t[:2], torch.tensor([1, 2]))
            x = x - torch.cat([uncond[:2] + 1.5 * (cond - uncond[:2]), uncond[2:]]) / 9
        return x

    found = moeca.calibrate(model, halves, **{"budget": "macs:0.5", **QUICK})
    used = quality(model, found, range(1000, 1002), halves)
    assert used == pytest.approx(found.predicted["psnr_db_holdout"], abs=0.02)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_order_that_was_asked_for_is_kept(model: nn.Module, order: int) -> None:
    found = calibrated(model, order=order)
    assert found.order == order
    assert all(found.depth(column) <= order + 1 for column in range(len(found.rows[0])))


def test_its_rollouts_are_kept_beside_the_others(model: nn.Module, tmp_path: Path) -> None:
    first = calibrated(model, resume=tmp_path)
    lines = (tmp_path / "region" / "fitted.jsonl").read_text().splitlines()
    assert lines
    assert all("fitted weights" in line for line in lines)
    assert "fitted weights" not in (tmp_path / "region" / "rollouts.jsonl").read_text()
    again = calibrated(model, resume=tmp_path)
    assert again.fitted == first.fitted
    assert (tmp_path / "region" / "fitted.jsonl").read_text().splitlines() == lines
