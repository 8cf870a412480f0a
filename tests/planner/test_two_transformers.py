"""One calibration for two transformers that take turns in one loop."""

from __future__ import annotations

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
