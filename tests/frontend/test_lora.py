"""LoRA adapters of several ranks (peft), swapped, scaled and stacked in one compiled graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from tests.facts import Recorder
from tests.following import Runner, assert_follows_the_oracle, subject_of
from tests.frontend.test_adapters import ATTENTION, EXPERTS, call, compiled, layers
from tests.sampling import dit, plain
from tests.tools import schedule_of

RANK, TIMES = 4, (900.0, 880.0, 860.0, 840.0)


def put_on(module: nn.Module, name: str, rank: int, targets: str = ATTENTION) -> None:
    torch.manual_seed(len(name))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        inject_adapter_in_model(config, module, name)


def stacked(targets: str = ATTENTION) -> nn.Module:
    """Two adapters of ranks 2 and 3 that are active at once, padded to one rank, their scales in tensors."""
    module = dit()
    put_on(module, "ink", 2, targets)
    put_on(module, "rough", 3, targets)
    prepare_model_for_compiled_hotswap(module, target_rank=RANK)
    for layer in layers(module):
        layer.set_adapter(["ink", "rough"])
    return module.requires_grad_(False).eval()


def scale(module: nn.Module, scales: Mapping[str, float]) -> None:
    for layer in layers(module):
        for name, value in scales.items():
            layer.scaling[name].fill_(value)


def swap(module: nn.Module) -> None:
    """Other weights for the adapter `ink`, in place: those of another file of the same padded rank."""
    generator = torch.Generator().manual_seed(7)
    for layer in layers(module):
        for matrix in (layer.lora_A["ink"], layer.lora_B["ink"]):
            matrix.weight.copy_(torch.randn(matrix.weight.shape, generator=generator))


def row_of(targets: str) -> str:
    return f"peft: two LoRAs on {'experts' if targets == EXPERTS else 'attention'}, swapped, scaled, stacked"


def made(model: Any) -> tuple[int, list[str]]:
    """Graphs of the handle, and the variants of the last steps."""
    stats = moeca.stats(model)
    return stats.graphs, [record.variant for record in stats.steps]


def sampled(model: Any) -> list[Tensor]:
    moeca.reset(model)
    with torch.no_grad(), moeca.trajectory(model, steps=len(TIMES)):
        return list(plain(model, times=TIMES))


@pytest.mark.parametrize(
    "targets", [pytest.param(ATTENTION, marks=pytest.mark.slow), EXPERTS], ids=["attention", "experts"]
)
@pytest.mark.slow
def test_swapped_scaled_and_stacked_adapters_make_no_new_variant(targets: str, fact: Recorder) -> None:
    module = stacked(targets)
    model = compiled(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*every expert runs on every token", MoecaWarning)
        call(model)
    seen: list[Tensor] = []
    changes = ({"ink": 1.0, "rough": 0.0}, {"ink": 0.0, "rough": 1.0}, {"ink": 0.3, "rough": 0.7}, "another adapter")
    known = made(model)[0]
    for change in changes:
        if isinstance(change, str):
            swap(module)
        else:
            scale(module, change)
        wanted = call(module)
        assert torch.allclose(call(model), wanted, rtol=0, atol=1e-6)
        cached = sampled(model)
        assert torch.allclose(cached[0], next(plain(module, times=TIMES)).detach(), rtol=0, atol=1e-6)
        assert made(model) == (known, ["v0", "v1", "v1", "v0"])
        assert all(not torch.allclose(wanted, other, atol=1e-3) for other in seen)
        seen.append(wanted)
    fact("changed", row_of(targets), captured="once", cached="yes")


@pytest.mark.slow
@pytest.mark.parametrize("targets", [ATTENTION, EXPERTS], ids=["attention", "experts"])
def test_adapted_models_follow_the_oracle(targets: str, fact: Recorder) -> None:
    module = stacked(targets)
    moeca.prepare(module)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def inputs(step: int) -> dict[str, Tensor]:
        return {"x": x * (1 - 0.05 * step), "t": torch.full((2,), 900.0 - 40 * step), "y": torch.tensor([1, 2])}

    one = subject_of(module, inputs)
    width = len(one.facts.regions)
    schedule = schedule_of(one.analysis, "C" * width, "F" * width)
    full, between = schedule.rows
    runner = Runner(one, schedule)
    for change in ({"ink": 0.5, "rough": 1.5}, {"ink": 0.0, "rough": 1.0}):
        scale(module, change)
        assert_follows_the_oracle(one, runner, [full, full, between, between, full, between])
        torch.testing.assert_close(runner(full, one.call(1))[0], one.eager(1), rtol=1e-5, atol=1e-5)
    fact("changed", row_of(targets), exact="equal to the reference, bit for bit")


@pytest.mark.slow
def test_an_adapter_of_another_rank_runs_right_and_says_what_it_cost() -> None:
    module = dit()
    put_on(module, "ink", 2)
    model = compiled(module.requires_grad_(False).eval())
    call(model)
    for layer in layers(module):
        layer.delete_adapter("ink")
    put_on(module, "ink", 3)
    module.requires_grad_(False).eval()
    with pytest.warns(MoecaWarning, match=r"weights have other shapes than before .*target_rank") as told:
        assert torch.allclose(call(model), call(module), rtol=0, atol=1e-6)
    assert len(told) == 1
    sampled(model)
    assert made(model)[1] == ["v0", "v1", "v1", "v0"]
