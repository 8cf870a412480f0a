"""Adapters (peft) on experts, attention or both, put on before or after compiling, and what is done to them then."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from moeca_compile.runtime import Session
from tests.sampling import dit, plain

EXPERTS, ATTENTION = r".*experts\.\d+\.(gate|up|down)_proj", r".*\.(qkv|proj)"
FOLLOWED = (
    "every expert runs on every token, by its own forward: .* expert 0 has an adapter \\(peft Linear\\) on gate_proj"
)


def adapt(module: nn.Module, targets: str = EXPERTS, name: str = "one", seed: int = 0) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        inject_adapter_in_model(config, module, name)
    module.requires_grad_(False).eval()


def layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def unload(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, BaseTunerLayer):
                parent._modules[name] = child.get_base_layer()


def compiled(module: nn.Module) -> Any:
    torch._dynamo.reset()  # it counts what all instances of a class were compiled with, and stops at some number
    return torch.compile(module, backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})


def call(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        result: Tensor = model(x, torch.full((2,), 900.0), torch.tensor([1, 2]))
    return result


def follows(model: Any, module: nn.Module) -> Tensor:
    """What the compiled model gives is what the module gives; its graph is whole and its steps are cached."""
    wanted = call(module)
    assert torch.allclose(call(model), wanted, rtol=0, atol=1e-6)
    moeca.reset(model)
    with torch.no_grad(), moeca.trajectory(model, steps=4):
        list(plain(model, times=(900.0, 880.0, 860.0, 840.0)))
    assert [record.variant for record in moeca.stats(model).steps] == ["v0", "v1", "v1", "v0"]
    return wanted


@pytest.mark.parametrize(
    ("style", "targets"),
    [
        pytest.param("numpy", EXPERTS, marks=pytest.mark.slow),
        pytest.param("numpy", ATTENTION, marks=pytest.mark.slow),
        ("hf", f"{EXPERTS}|{ATTENTION}"),
    ],
    ids=["experts", "attention", "both, another dispatch"],
)
@pytest.mark.slow
def test_adapters_put_on_after_compiling_are_followed_and_cached(style: str, targets: str) -> None:
    module = dit(style=style)
    model = compiled(module)
    base = follows(model, module)
    adapt(module, targets)
    if targets == ATTENTION:
        adapted = follows(model, module)
    else:
        with pytest.warns(MoecaWarning, match=FOLLOWED) as told:
            adapted = follows(model, module)
        assert len(told) == 1
    assert not torch.allclose(base, adapted, atol=1e-3)


@pytest.mark.slow
def test_what_is_done_to_adapters_later_is_followed() -> None:
    module = dit()
    adapt(module)
    model = compiled(module)
    with pytest.warns(MoecaWarning, match=FOLLOWED):
        seen = [follows(model, module)]

    def changed() -> bool:
        seen.append(follows(model, module))
        return not torch.allclose(seen[-1], seen[-2], atol=1e-4)

    def each(change: Callable[[Any], Any]) -> None:
        for layer in layers(module):
            change(layer)

    each(lambda layer: layer.scale_layer(0.25))
    assert changed()
    each(lambda layer: layer.lora_A["one"].weight.mul_(3.0))
    assert changed()
    adapt(module, name="two", seed=3)
    each(lambda layer: layer.set_adapter("two"))
    module.requires_grad_(False)
    assert changed()
    each(lambda layer: layer.enable_adapters(False))
    assert changed()
    each(lambda layer: layer.enable_adapters(True))
    module.requires_grad_(False)
    assert changed()
    each(lambda layer: layer.merge())
    assert not changed()
    unload(module)  # of what is merged: the weights stay as they are
    assert not changed()
    assert "moeca.experts" in _graph(module)


@torch.no_grad()
def _graph(module: nn.Module) -> str:
    """What is traced now."""
    codes: list[str] = []

    def look(gm: torch.fx.GraphModule, _: Any) -> Any:
        codes.append(gm.code)
        return gm

    call(torch.compile(module, backend=look, fullgraph=True))
    return "".join(codes)


def test_adapters_put_on_before_are_named_and_gone_again_the_operator_runs() -> None:
    module = dit()
    adapt(module)
    report = moeca.prepare(module)
    assert len(report.changed) == 1
    assert not report.rejected
    assert "followed      blocks.0.moe: expert 0 has an adapter (peft Linear) on gate_proj" in str(report)
    unload(module)
    assert not moeca.prepare(module).followed
    assert "moeca.experts" in _graph(module)


@pytest.mark.slow
def test_experts_of_any_body_are_followed_too() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up_proj, self.down_proj = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(torch.tanh(self.up_proj(self.norm(x))))

    module = dit()
    for block in module.blocks:
        block.moe.experts = nn.ModuleList(Normed().eval().requires_grad_(False) for _ in range(3))
    model = compiled(module)
    base = follows(model, module)
    adapt(module)
    with pytest.warns(MoecaWarning, match="expert 0 has an adapter"):
        assert not torch.allclose(follows(model, module), base, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["activation", "count"])
def test_an_expert_that_becomes_another_one_is_proven_anew(kind: str) -> None:
    module = dit()
    model = compiled(module)
    base = follows(model, module)
    for block in module.blocks:
        if kind == "activation":
            for expert in block.moe.experts:
                expert.gate_proj = nn.Sequential(expert.gate_proj, nn.Tanh())
        else:
            del block.moe.experts[2]
            block.moe.router = nn.Linear(32, 2, bias=False).eval().requires_grad_(False)
    call(model)
    assert not torch.allclose(follows(model, module), base, atol=1e-3)


@pytest.mark.slow
def test_an_exported_bundle_has_the_adapter(tmp_path: Path) -> None:
    module = dit()
    base = call(module)
    moeca.prepare(module)
    adapt(module)
    x, t, y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((2,), 900.0), [1, 2]
    moeca.export(module, (x, t, torch.tensor(y)), "full", tmp_path / "bundle", dynamic_batch=False)
    session = Session.open(tmp_path / "bundle", threads=1)
    (got,) = session.run({"x": x.numpy(), "t": t.numpy(), "y": np.array(y)}).values()
    assert torch.allclose(torch.from_numpy(got), call(module), rtol=0, atol=1e-5)
    assert not torch.allclose(torch.from_numpy(got), base, atol=1e-3)
