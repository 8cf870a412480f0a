"""The models of the examples: found whole, cached as the reference says, exported once prepared."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from examples.dit_moe import dit_moe
from examples.dsmoe import DSMoE, DSMoEConfig
from examples.skip_dit import SkipDiT
from tests.facts import Recorder
from tests.following import Runner, assert_follows_the_oracle, subject_of
from tests.tools import schedule_of

SIZES = {"input_size": 8, "in_channels": 1, "num_classes": 10}


def shaken(model: nn.Module) -> nn.Module:
    """adaLN-zero starts with branches that contribute nothing: here all do."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


def dit_moe_small() -> nn.Module:
    return dit_moe("S/2-8E2A", depth=2, hidden_size=24, num_heads=2, expert_hidden=16, shared_hidden=16, **SIZES)


def dsmoe_small() -> nn.Module:
    config = DSMoEConfig(
        hidden_size=24, depth=2, num_heads=2, num_experts=16, experts_per_token=4, expert_hidden=8, shared_hidden=16,
        learn_sigma=False, **SIZES,
    )  # fmt: skip
    return DSMoE(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], str]] = {
    "DiT-MoE (examples/dit_moe.py)": (dit_moe_small, {"attention": 2, "experts": 2}, "token choice"),
    "DSMoE (examples/dsmoe.py)": (dsmoe_small, {"attention": 2, "experts": 2}, "token choice"),
    "Skip-DiT (examples/skip_dit.py)": (
        lambda: SkipDiT(depth=4, hidden_size=24, num_heads=2, **SIZES), {"attention": 4, "mlp": 4}, ""
    ),
}  # fmt: skip


def inputs(step: int) -> dict[str, Tensor]:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"x": x * (1 - 0.05 * step), "t": torch.full((2,), 900.0 - 40 * step), "y": torch.tensor([1, 5])}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (not name.startswith("Skip-DiT"))) for name in MODELS]
)
def test_found_cached_and_exported(name: str, fact: Recorder) -> None:
    build, kinds, routing = MODELS[name]
    torch.manual_seed(0)
    model = shaken(build())
    wanted = [model(**inputs(step)) for step in range(3)]
    moeca.prepare(model)
    one: Any = subject_of(model, inputs)
    found = Counter(region.kind for region in one.facts.regions)
    assert found == kinds
    assert not one.facts.rejected
    assert {f"{router.choice} choice" for router in one.facts.routers} == ({routing} if routing else set())

    width = len(one.facts.regions)
    schedule = schedule_of(one.analysis, "C" * width, "F" * width)
    full, between = schedule.rows
    assert_follows_the_oracle(one, Runner(one, schedule), [full, full, between, between, full, between])
    torch.testing.assert_close(Runner(one, schedule)(full, one.call(1))[0], wanted[1], rtol=1e-5, atol=1e-5)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        exported = torch.export.export(model, (), inputs(0), strict=False).module()
    torch.testing.assert_close(exported(**inputs(2)), wanted[2], rtol=1e-5, atol=1e-5)
    fact(
        "models", name, found=", ".join(f"{n} {kind}" for kind, n in found.items()), attention="self", routing=routing,
        cached="equal to the reference, bit for bit", exported="yes",
    )  # fmt: skip
