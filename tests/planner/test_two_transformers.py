"""One calibration for two transformers that take turns in one loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.schedule import Action
from tests.frontend.test_two_transformers import SWITCH, TIMES, Pipeline, models, sample


def drawn(pair: Any, seed: int) -> Tensor:
    return sample(pair, seed)[-1]


def calibrated(model: Any, draw: Any) -> moeca.Schedule:
    torch._dynamo.reset()
    return moeca.calibrate(
        model, draw, budget="macs:0.6", seeds=2, holdout=0, order=1, granularity="region", max_variants=2,
        inner="eager", progress=False,
    )  # fmt: skip


def test_two_transformers_get_one_schedule() -> None:
    schedule = calibrated(models(), drawn)
    assert len(schedule.rows) == len(TIMES)
    assert schedule.timesteps == TIMES
    assert set(schedule.rows[SWITCH]) == {Action.COMPUTE}
    assert schedule.predicted["mac_fraction"] <= 0.6
    torch._dynamo.reset()
    pair = moeca.compile(models(), schedule=schedule, inner="eager")
    found = drawn(pair, 0)
    assert abs(moeca.stats(pair).mac_fraction - schedule.predicted["mac_fraction"]) < 1e-6
    assert not any(record.cold for record in moeca.stats(pair).steps)
    truth = drawn(models(), 0)
    assert (found - truth).norm() < 0.1 * truth.norm()


@pytest.mark.slow
def test_a_pipeline_with_two_transformers_is_calibrated_as_one() -> None:
    pipe = Pipeline(*models())
    plain = pipe.transformer, pipe.transformer_2
    schedule = calibrated(pipe, lambda pair, seed: drawn([pipe.transformer, pipe.transformer_2], seed))
    assert set(schedule.rows[SWITCH]) == {Action.COMPUTE}
    assert (pipe.transformer, pipe.transformer_2) == plain


@pytest.mark.parametrize(("difference", "better"), [(0.0, True), pytest.param(1.0, False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_state_is_handed_over_where_that_was_better(difference: float, better: bool, tmp_path: Path) -> None:
    """Equal weights: the second model's forecasts want what the first one kept. Independent ones: it misleads them."""
    schedule = calibrated(models(difference), drawn)
    tried = schedule.predicted["tried hand_over"], schedule.predicted["tried cold start"]
    assert (tried[0] > tried[1]) is better
    assert schedule.hand_over is better
    assert schedule.predicted["psnr_db"] == max(tried)
    assert ("handed over" if better else "cold start") in schedule.made_by
    schedule.save(tmp_path / "schedule.json")
    assert moeca.Schedule.load(tmp_path / "schedule.json") == schedule
    torch._dynamo.reset()
    pair = moeca.compile(models(difference), schedule=schedule, inner="eager")
    kept = moeca.compile(
        models(difference), schedule=replace(schedule, hand_over=False), hand_over=better, inner="eager"
    )
    assert torch.equal(drawn(pair, 0), drawn(kept, 0)), "the schedule sets what the option would"
    assert moeca.stats(pair).mac_fraction == pytest.approx(schedule.predicted["mac_fraction"])
