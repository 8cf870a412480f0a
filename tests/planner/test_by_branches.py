"""`calibrate(branches=...)`: cheap rows that compute some branches are searched, told of, and returned when better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.errors import ScheduleError
from moeca_compile.planner.refine import thin
from moeca_compile.schedule import Action, Partial, Schedule
from tests.models import DiT
from tests.test_calibrate import STEPS, mean_psnr, sample

QUICK: dict[str, Any] = {
    "inner": "eager", "progress": False, "seeds": (0, 1), "holdout": (1000,), "effort": 4, "data_range": 4.0,
    "max_variants": 2, "granularity": "region",
}  # fmt: skip


class Nervous(DiT):
    """Its routers change their mind a lot, and what its experts say weighs much: transitions are what goes wrong."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        with torch.no_grad():
            for block in self.blocks:
                block.moe.router.weight.mul_(8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Nervous().eval()


@pytest.fixture(scope="module")
def found(model: nn.Module) -> Schedule:
    return moeca.calibrate(model, sample, budget="macs:0.65", branches=0.1, **QUICK)


@pytest.mark.slow
def test_the_better_of_both_is_returned(found: Schedule) -> None:
    """What each reached is told, on the seeds that it got to."""
    tried = found.predicted
    names = {key.removeprefix("tried ") for key in tried if key.startswith("tried ")}
    assert any(name.startswith("branches, ") for name in names)
    assert any(not name.startswith("branches, ") for name in names)
    acts = {act for row in found.rows for act in row}
    assert acts == {Action.COMPUTE, Action.FORECAST, Partial(0, 0.1)}, "branches win on this model"
    assert "0.1 of the branches in every cheap row" in found.made_by
    assert any("third of the layers as whole regions" in name for name in names), "tried, and told of"
    assert tried["mac_fraction"] <= 0.65


@pytest.mark.slow
def test_whole_regions_are_returned_where_they_are_better(model: nn.Module) -> None:
    """At a smaller budget the branches cost a full step that is worth more."""
    found = moeca.calibrate(model, sample, budget="macs:0.5", branches=0.1, **QUICK)
    assert any(name.startswith("tried branches, ") for name in found.predicted)
    assert {act for row in found.rows for act in row} == {Action.COMPUTE, Action.FORECAST}


@pytest.mark.slow
def test_a_run_with_it_has_the_predicted_error_cost_and_state(model: nn.Module, found: Schedule) -> None:
    compiled = moeca.compile(model, schedule=Schedule.from_json(found.to_json()), inner="eager")
    with torch.no_grad():
        for seeds, key in (((0, 1), "psnr_db"), ((1000,), "psnr_db_holdout")):
            truth, cached = [sample(model, seed) for seed in seeds], [sample(compiled, seed) for seed in seeds]
            assert mean_psnr(cached, truth) == pytest.approx(found.predicted[key], abs=0.02)
    stats = moeca.stats(compiled)
    assert stats.mac_fraction == pytest.approx(found.predicted["mac_fraction"], abs=1e-6)
    assert stats.state_bytes == 2 * found.predicted["state_bytes"], "two streams"
    assert len(found.rows) == STEPS


@pytest.mark.slow
def test_a_thinned_schedule_is_as_it_was_predicted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """One way is forced upon it: on this model none is better."""
    way = "first third of the layers as whole regions"
    monkeypatch.setattr(thin, "BETTER_DB", -99.0)
    monkeypatch.setattr(thin, "ways_of", lambda regions, all_ways=thin.ways_of: {way: all_ways(regions)[way]})
    found = moeca.calibrate(model, sample, budget="macs:0.65", branches=0.1, **QUICK)
    assert found.made_by.endswith(way)
    kept = dict(zip(found.regions or (), zip(*found.rows, strict=True), strict=True))
    assert Partial(0, 0.1) not in kept["blocks.0.moe"]
    assert Partial(0, 0.1) in kept["blocks.1.moe"]
    test_a_run_with_it_has_the_predicted_error_cost_and_state(model, found)


@pytest.mark.slow
def test_the_cheaper_one_is_returned_for_a_quality(model: nn.Module) -> None:
    without = moeca.calibrate(model, sample, budget="psnr:40", **QUICK)
    given = moeca.calibrate(model, sample, budget="psnr:40", branches=0.2, **QUICK)
    assert given.predicted["mac_fraction"] <= without.predicted["mac_fraction"]
    assert given.predicted["psnr_db"] >= 40


class Dense(DiT):
    """Nothing routed."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth=depth)
        for block in self.blocks:
            block.moe = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))


@pytest.mark.parametrize(
    ("net", "wrong", "says"),
    [
        (DiT, {"branches": 1.5}, "branches=1.5, expected a fraction"),
        (DiT, {"branches": -0.1}, "branches=-0.1, expected a fraction"),
        (DiT, {"branches": 0.1, "order": 2}, "forecast with order 1, not with order=2"),
        (DiT, {"branches": 0.1, "granularity": "stack"}, "no experts can be taken apart by themselves at granularity"),
        (Dense, {"branches": 0.1}, "it has no columns of experts"),
    ],
)
def test_what_cannot_be_is_refused(net: type[DiT], wrong: dict[str, Any], says: str) -> None:
    torch.manual_seed(0)

    with pytest.raises(ScheduleError, match=says):
        moeca.calibrate(net(depth=1).eval(), sample, budget="macs:0.6", **{**QUICK, **wrong})
