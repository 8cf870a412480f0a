"""Routers stay as their authors wrote them, whatever they compute; so do shared experts and dense blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch import prepare
from tests.expert_dispatch import routers
from tests.expert_dispatch.test_dispatch import compiled
from tests.facts import Recorder


def tokens(width: int = routers.WIDTH) -> Tensor:
    return torch.randn(2, 9, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("router", routers.ROUTERS)
def test_router(router: str) -> None:
    torch.manual_seed(0)
    layer, x = routers.Routed(router).eval(), tokens()
    with torch.no_grad():
        wanted = layer(x)
        assert [one.num_experts for one in prepare(layer).changed] == [routers.EXPERTS]
        got, calls = compiled(layer, x)
    assert calls == ["moeca.experts"]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_shared_experts(shared: int) -> None:
    torch.manual_seed(0)
    layer, x = routers.Routed("biased", shared).eval(), tokens()
    with torch.no_grad():
        wanted = layer(x)
        report = prepare(layer)
        assert [one.num_experts for one in report.changed] == [routers.EXPERTS]
        assert not report.rejected
        torch.testing.assert_close(compiled(layer, x)[0], wanted)


def test_dense_blocks_between() -> None:
    torch.manual_seed(0)
    model, x = routers.Interleaved().eval(), tokens()
    with torch.no_grad():
        wanted = model(x)
        report = prepare(model)
        assert [one.path for one in report.changed] == ["blocks.1", "blocks.3"]
        assert not report.rejected
        got, calls = compiled(model, x)
    assert calls == ["moeca.experts"] * 2
    torch.testing.assert_close(got, wanted)


def mixtral() -> nn.Module:
    from transformers.models.mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralSparseMoeBlock(plain(MixtralConfig(**sizes)))


def qwen3() -> nn.Module:
    from transformers.models.qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}
    return Qwen3MoeSparseMoeBlock(plain(Qwen3MoeConfig(**sizes, norm_topk_prob=True)))


def deepseek() -> nn.Module:
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3}
    return DeepseekV3MoE(plain(DeepseekV3Config(**sizes, n_group=4, topk_group=2, n_shared_experts=1)))


def plain(config: Any) -> Any:
    config._experts_implementation = "eager"
    return config


@pytest.mark.parametrize("make", [mixtral, qwen3, deepseek])
def test_layers_of_transformers(make: Callable[[], nn.Module], fact: Recorder) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    layer, x = make().eval(), tokens(32)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.3)  # they are built empty
        wanted = layer(x)
        report = prepare(layer)
        assert [(one.path, one.activation, one.gated) for one in report.changed] == [("experts", "silu", True)]
        assert not report.rejected
        got, calls = compiled(layer, x)
        assert torch.equal(layer(x), wanted)
    assert calls == ["moeca.experts"]
    torch.testing.assert_close(got, wanted)
    fact("dispatch", f"transformers: {type(layer).__name__}", family=report.changed[0].family, result="rewritten")
