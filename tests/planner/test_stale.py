"""A stale expert against the same made by hand in the model's own code; what it costs, what is kept and shown."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.planner.drift.stale import stale_samples
from moeca_compile.planner.rollout import SampledModel
from moeca_compile.planner.store import Store
from tests.models import DiT

STEPS = 7
EXPERTS = 4


def sample(model: Any, seed: int) -> Tensor:
    """Two calls a step: each stream has its own stale part."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        t = torch.full((2,), 1000.0 * (1 - step / STEPS))
        cond, uncond = model(x, t, torch.tensor([1, 2])), model(x, t, torch.tensor([10, 10]))
        x = x - (uncond + 1.5 * (cond - uncond)) / STEPS
    return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return DiT(depth=2).eval().requires_grad_(False)


class StaleExpert:
    """A forward hook: at odd steps this expert's part is that of the step before."""

    def __init__(self, expert: int) -> None:
        self.expert, self.calls = expert, 0
        self.kept: dict[int, Tensor] = {}

    def __call__(self, moe: Any, args: Any, output: Tensor) -> Tensor:
        step, stream = divmod(self.calls, 2)
        self.calls += 1
        tokens = args[0].reshape(-1, args[0].shape[-1])
        ids, weights = moe.route(tokens)
        part = ((ids == self.expert) * weights).sum(dim=1, keepdim=True) * moe.experts[self.expert](tokens)
        then, self.kept[stream] = self.kept.get(stream), part
        return output if step % 2 == 0 or then is None else output + (then - part).reshape(output.shape)


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "expert"), [(0, 1), (1, 3)])
def test_it_is_what_the_models_own_code_gives(model: nn.Module, layer: int, expert: int) -> None:
    plain = copy.deepcopy(model)
    plain.blocks[layer].moe.register_forward_hook(StaleExpert(expert))
    expected, uncached = sample(plain, 3), sample(model, 3)
    sampled = SampledModel(copy.deepcopy(model), sample, "region", "eager")
    sampled.run(3)
    region, info = [(region, info) for region in sampled.program.regions for info in region.experts][layer]
    made = stale_samples(sampled, 3, region, info, expert)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-3)
    assert (expected - uncached).norm() > 100 * (made - expected).norm(), "what it changes is far more than rounding"


@pytest.mark.slow
def test_those_that_drift_most_are_tried_within_the_price_and_kept(model: nn.Module, tmp_path: Path) -> None:
    told: list[int] = []

    def counted(net: Any, seed: int) -> Tensor:
        told.append(seed)
        return sample(net, seed)

    def found(perturb: int) -> dict[str, float]:
        told.clear()
        return dict(
            moeca.calibrate(
                copy.deepcopy(model), counted, budget="macs:0.6", granularity="region", seeds=(0, 1), holdout=0,
                effort=4, max_variants=2, inner="eager", progress=False, resume=tmp_path, perturb=perturb,
            ).predicted
        )  # fmt: skip

    without = found(0)
    store = Store(tmp_path / "region")
    assert store.perturbations() == []
    again = found(3)
    checks = 2 + 2  # the first seed twice, and the first call of each seed
    assert len(told) == checks + 3, "one trajectory for each expert"
    assert again["psnr_db"] == without["psnr_db"]
    kept = store.drift()
    assert kept is not None
    drifts = {(one["region"], one["expert"]): one["forecast"] for one in kept[1]["experts"]}
    worst = sorted(drifts, key=lambda one: -drifts[one])
    assert [(one.region, one.expert) for one in store.perturbations()] == worst[:3]
    assert all(20 < one.psnr_db < 140 and one.seed == 0 for one in store.perturbations())
    assert again["trajectories"] > without["trajectories"], "they are counted"
    found(2 * EXPERTS + 5)
    assert len(told) == checks + 2 * EXPERTS - 3, "no more than there are, and none twice"
