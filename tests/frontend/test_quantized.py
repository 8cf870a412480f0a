"""Weights that are no plain tensors: torchao's int8, on linear layers and on experts; float8 that the code casts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, UserError
from tests.frontend.test_adapters import call, compiled, follows
from tests.sampling import dit, plain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_


def quantize(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(module, Int8WeightOnlyConfig())
    module.requires_grad_(False)


@pytest.mark.parametrize("style", ["numpy", "dense"])
def test_int8_weights_from_the_start_run_in_one_graph_and_cached(style: str) -> None:
    module = dit(style=style)
    quantize(module)
    model = compiled(module)
    if style == "dense":
        follows(model, module)
    else:
        with pytest.warns(MoecaWarning, match=r"expert 0 has a Int8Tensor of float32 on gate_proj\.weight"):
            follows(model, module)


def test_int8_weights_put_in_after_compiling_are_followed() -> None:
    module = dit()
    model = compiled(module)
    base = follows(model, module)
    quantize(module)
    with pytest.warns(MoecaWarning, match="expert 0 has a Int8Tensor"):
        assert not torch.equal(follows(model, module), base)


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
