"""Weights that are no plain tensors: torchao's int8, on linear layers and on experts; float8 that the code casts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, UserError
from moeca_compile.graph import fx
from tests.facts import Recorder
from tests.following import Runner, assert_follows_the_oracle, subject_of
from tests.frontend.test_adapters import call, compiled, follows
from tests.sampling import dit, plain
from tests.tools import schedule_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )
    from torchao.quantization import quantize_ as quantize_in_place

CONFIGS: dict[str, Callable[[], Any]] = {
    "int8": Int8WeightOnlyConfig,
    "int4, groups of 16": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
    "float8": Float8WeightOnlyConfig,
    "int8, activations too": Int8DynamicActivationInt8WeightConfig,
}
WEIGHTS_ONLY = [pytest.param(name, marks=[pytest.mark.slow] * (name == "float8")) for name in list(CONFIGS)[:3]]


def quantize(module: nn.Module, config: str = "int8") -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_in_place(module, CONFIGS[config]())
    module.requires_grad_(False)


@pytest.mark.parametrize("config", WEIGHTS_ONLY)
@pytest.mark.parametrize("style", [pytest.param("dense", marks=pytest.mark.slow), "numpy"])
def test_weight_only_quantization_follows_the_oracle(config: str, style: str, fact: Recorder) -> None:
    module = dit(style=style)
    quantize(module, config)
    moeca.prepare(module)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def inputs(step: int) -> dict[str, Tensor]:
        return {"x": x * (1 - 0.05 * step), "t": torch.full((2,), 900.0 - 40 * step), "y": torch.tensor([1, 2])}

    one = subject_of(module, inputs)
    assert {region.kind for region in one.facts.regions} == {"attention", "experts"}
    assert any(map(fx.is_experts, one.analysis.gm.graph.nodes)) == (style == "numpy")
    width = len(one.facts.regions)
    schedule = schedule_of(one.analysis, "C" * width, "F" * width)
    full, between = schedule.rows
    runner = Runner(one, schedule)
    assert_follows_the_oracle(one, runner, [full, full, between, between, full, between])
    torch.testing.assert_close(runner(full, one.call(1))[0], one.eager(1), rtol=1e-5, atol=1e-5)
    name = (
        f"torchao: {config}, weights only, experts {'that are dispatched to' if style == 'numpy' else 'that all run'}"
    )
    fact("changed", name, captured="once", cached="yes", exact="equal to the reference, bit for bit")


@pytest.mark.slow
def test_calibrated_with_the_full_precision_model_as_truth() -> None:
    full_precision, module = dit(style="dense"), dit(style="dense")
    quantize(module, "int4, groups of 16")

    def sample(model: Any, seed: int) -> Tensor:
        *_, last = plain(model, seed=seed, times=(900.0, 800.0, 700.0, 600.0))
        return last.detach()

    with torch.no_grad():
        schedule = moeca.calibrate(
            module, sample, budget="macs:0.5", granularity="output", seeds=4, holdout=1, inner="eager",
            truth=lambda seed: sample(full_precision, seed), progress=False,
        )  # fmt: skip
        cached = moeca.compile(module, schedule=schedule, granularity="output", inner="eager")
        comparison = moeca.compare(
            cached, sample, seeds=[7], truth=lambda seed: sample(full_precision, seed), progress=False
        )
    assert comparison.mean("psnr_db", "given") > 0


@pytest.mark.parametrize("style", ["numpy", pytest.param("dense", marks=pytest.mark.slow)])
def test_int8_weights_from_the_start_run_in_one_graph_and_cached(style: str) -> None:
    module = dit(style=style)
    quantize(module)
    model = compiled(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoecaWarning)
        follows(model, module)


@pytest.mark.slow
def test_experts_that_quantize_their_tokens_too_run_by_their_own_forward() -> None:
    module = dit()
    for block in module.blocks:
        quantize(block.moe.experts, "int8, activations too")
    model = compiled(module)
    with pytest.warns(MoecaWarning, match=r"expert 0 has a Int8Tensor of float32 on gate_proj\.weight"):
        follows(model, module)


@pytest.mark.slow
def test_int8_weights_put_in_after_compiling_are_followed() -> None:
    module = dit()
    model = compiled(module)
    base = follows(model, module)
    quantize(module)
    assert not torch.equal(follows(model, module), base)


@pytest.mark.slow
def test_a_trajectory_holds_for_quantised_weights() -> None:
    module = dit(style="dense")
    quantize(module)
    model = compiled(module)
    call(model)
    moeca.reset(model)
    with torch.no_grad(), moeca.trajectory(model, steps=3, frozen=True):
        (first, *_) = list(plain(model, times=(900.0, 880.0, 860.0)))
    assert [one.variant for one in moeca.stats(model).steps] == ["v0", "v1", "v1"]
    with torch.no_grad():
        assert torch.allclose(first, next(plain(module, times=(900.0, 880.0))), rtol=0, atol=1e-6)


class Cast(nn.Linear):
    """Stored in float8, computed in the tokens' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


@pytest.mark.slow
def test_float8_that_the_experts_cast_themselves() -> None:
    module = dit()
    for block in module.blocks:
        for expert in block.moe.experts:
            for name, layer in list(expert.named_children()):
                stored = Cast(layer.in_features, layer.out_features, bias=False).to(torch.float8_e4m3fn)
                stored.weight.data.copy_(layer.weight)
                setattr(expert, name, stored)
    module.requires_grad_(False).eval()
    model = compiled(module)
    with pytest.warns(MoecaWarning, match=r"expert 0 has a Parameter of float8_e4m3fn on gate_proj\.weight"):
        follows(model, module)


def test_an_operator_given_float8_says_so() -> None:
    weights: list[Any] = [torch.zeros(4, 4, dtype=torch.float8_e4m3fn)]
    with pytest.raises(UserError, match=r"a weight torch\.float8_e4m3fn"):
        torch.ops.moeca.experts(torch.ones(2, 4), torch.zeros(2, 1).long(), weights, weights, [], [], [], [], "silu")


class Unknown(Tensor):
    """A quantized weight of a class that says nothing of the tensors in it: nothing can be traced through it."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Unknown:
        made: Unknown = Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values)
        args, kwargs = tree_map_only(cls, lambda weight: 0.5 * weight.values.float(), (args, kwargs or {}))
        return func(*args, **kwargs)


def test_a_class_of_weights_that_nobody_knows_runs_uncached_and_right() -> None:
    module = dit(style="dense")
    block: Any = module.blocks[0]
    block.proj.weight = nn.Parameter(Unknown((2.0 * block.proj.weight).round().to(torch.int8)), requires_grad=False)
    wanted = call(module)
    model = compiled(module)
    with pytest.warns(MoecaWarning, match=r"graph break: 4 parts.*\n.*F\.linear\(input, self\.weight, self\.bias\)"):
        results = [call(model) for _ in range(2)]
    assert all(torch.equal(result, wanted) for result in results)
    assert not moeca.stats(model).steps
