"""Every uniform schedule that a budget allows, rolled out after a calibration: none is better on the search's seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.planner.latency import costs
from moeca_compile.planner.rollout import SampledModel
from moeca_compile.planner.search.predict import ORDERS
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import Plan, uniform_letters
from tests.models import DiT

STEPS, SEEDS, RANGE = 8, (0, 1, 2, 3), 4.0


def sample(model: Any, seed: int) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        x = x - model(x, torch.full((2,), 1000.0 * (1 - step / STEPS)), torch.tensor([1, 2])) / STEPS
    return x


@pytest.mark.parametrize("share", [0.4, pytest.param(0.65, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_no_uniform_schedule_is_better(share: float) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: nn.Module = DiT(depth=1, dim=16).eval()
    found = moeca.calibrate(
        model, sample, budget=f"macs:{share}", granularity="region", seeds=SEEDS, holdout=0, data_range=RANGE,
        effort=3, inner="eager", progress=False,
    )  # fmt: skip
    sampled = SampledModel(model, sample, "region", "eager")
    truth = {seed: sampled.run(seed) for seed in SEEDS}
    letters = {uniform_letters(STEPS, n, w) for n in range(1, STEPS + 1) for w in range(1, STEPS)}
    priced = costs(sampled, "CF", ORDERS, SEEDS[0], timed=False)
    plans = [Plan(text, order.name) for text in sorted(letters) for order in ORDERS]
    qualities = {}
    for plan in plans:
        if priced.fraction(plan) <= share:
            made = {seed: sampled.run(seed, plan) for seed in SEEDS}
            errors = [(made[seed] - truth[seed]).square().flatten(1).mean(dim=1).tolist() for seed in SEEDS]
            qualities[plan] = mean_psnr(errors, RANGE)
    assert len(qualities) > 12
    best = max(qualities, key=lambda plan: qualities[plan])
    assert found.predicted["psnr_db"] >= qualities[best] - 1e-3, best
