"""Hooks that move or cast weights around each layer: the model's own code runs, right, uncached, and says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers.hooks
import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.errors import CaptureError, MoecaWarning
from tests.frontend.test_adapters import call, compiled, follows
from tests.models import DiT


def dit() -> nn.Module:
    """With few layers: each hook is a graph of its own."""
    torch.manual_seed(0)
    return DiT(depth=1, num_experts=2, top_k=1, shared=False).eval().requires_grad_(False)


def accelerated(module: nn.Module) -> None:
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))


def cast(module: nn.Module) -> None:
    diffusers.hooks.apply_layerwise_casting(module, torch.float8_e4m3fn, torch.float32)


def grouped(module: nn.Module) -> None:
    device = torch.device("cpu")
    diffusers.hooks.apply_group_offloading(module, device, device, offload_type="leaf_level")


def right(model: Any, module: nn.Module) -> list[str]:
    """Equal to the module's own eager result, and finite; what it says to that."""
    wanted = call(module)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            got = call(model)
            assert bool(got.isfinite().all())
            assert torch.allclose(got, wanted, rtol=0, atol=1e-6)
    return [str(one.message) for one in told if issubclass(one.category, MoecaWarning)]


@pytest.mark.parametrize(
    ("offload", "hook", "remedy"),
    [
        (accelerated, "an accelerate hook (AlignDevicesHook)", "enable_model_cpu_offload()"),
        pytest.param(
            cast, "a diffusers hook (layerwise_casting)", "in the dtype that they compute in", marks=pytest.mark.slow
        ),
        pytest.param(grouped, "a diffusers hook (", "enable_model_cpu_offload()", marks=pytest.mark.slow),
    ],
)
def test_hooks_put_on_after_compiling(offload: Callable[[nn.Module], None], hook: str, remedy: str) -> None:
    module = dit()
    model = compiled(module)
    follows(model, module)
    offload(module)
    told = right(model, module)
    named = [one for one in told if f"expert 0 has {hook}" in one]
    assert len(named) == 1
    assert "on gate_proj: " in named[0]
    assert remedy in named[0]


def test_hooks_put_on_before_are_named_in_the_report() -> None:
    module = dit()
    accelerated(module)
    report = moeca.prepare(module)
    assert not report.changed
    assert "expert 0 has an accelerate hook (AlignDevicesHook) on gate_proj: take the hooks off" in str(report)


@pytest.mark.slow
def test_hooks_taken_off_again() -> None:
    module = dit()
    model = compiled(module)
    base = follows(model, module)
    accelerated(module)
    right(model, module)
    accelerate.hooks.remove_hook_from_module(module, recurse=True)
    right(model, module)
    assert torch.allclose(follows(model, module), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", ["compiled", pytest.param("offloaded", marks=pytest.mark.slow)])
def test_the_whole_model_offloaded_is_cached(first: str) -> None:
    """`enable_model_cpu_offload` puts one hook on the model itself, and its forward runs behind the hook."""
    module = dit()
    if first == "compiled":
        model = compiled(module)
        follows(model, module)
    _, hook = accelerate.cpu_offload_with_hook(module, execution_device=torch.device("cpu"))
    if first == "offloaded":
        model = compiled(module)
    follows(model, module)
    hook.offload()
    follows(model, module)
    hook.remove()
    follows(model, module)


def test_a_hook_on_the_whole_model_that_computes_is_told() -> None:
    """What it computes before the model begins is a graph of its own."""

    class Scales(accelerate.hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            x = args[0] * 0.5
            torch._dynamo.graph_break()
            return (x, *args[1:]), kwargs

    module = dit()
    accelerate.hooks.add_hook_to_module(module, Scales())
    assert any("graph break" in text for text in right(compiled(module), module))


def test_export_names_the_hooks(tmp_path: Any) -> None:
    module = dit()
    accelerated(module)
    example = (torch.randn(2, 4, 8, 8), torch.full((2,), 900.0), torch.tensor([1, 2]))
    with pytest.raises(CaptureError, match=r"expert 0 has an accelerate hook \(AlignDevicesHook\) on gate_proj"):
        moeca.export(module, example, "uniform:3", tmp_path / "bundle")
