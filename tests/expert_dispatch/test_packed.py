"""Experts kept as stacked parameters, as Hugging Face transformers keeps them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_compile.expert_dispatch import prepare
from tests.expert_dispatch.layers import EXPERTS, HIDDEN, TOP_K, WIDTH
from tests.expert_dispatch.test_dispatch import compiled


class Packed(nn.Module):
    """`gate_up` [E, 2I, D] and `down` [E, D, I]; the layout of the fused half is a setting."""

    def __init__(self, transposed: bool = False, interleaved: bool = False, gated: bool = True) -> None:
        super().__init__()
        self.transposed, self.interleaved, self.gated = transposed, interleaved, gated
        shapes = (2 * HIDDEN if gated else HIDDEN, WIDTH), (WIDTH, HIDDEN)
        first, second = (torch.randn(EXPERTS, *(s[::-1] if transposed else s)) * 0.2 for s in shapes)
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def one(self, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        h = x @ first if self.transposed else F.linear(x, first)
        if self.gated:
            gate, up = (h[:, ::2], h[:, 1::2]) if self.interleaved else h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h)
        return h @ second if self.transposed else F.linear(h, second)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        masks = F.one_hot(ids, num_classes=EXPERTS).permute(2, 1, 0)
        for e in torch.greater(masks.sum((-1, -2)), 0).nonzero()[:, 0]:
            slot, token = torch.where(masks[e])
            y = self.one(self.first[e], self.second[e], x[token])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class Clamped(Packed):
    """An activation that is none of ours."""

    def one(self, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, first)[:, :HIDDEN].clamp(max=0.1).tanh(), second)


class Inline(nn.Module):
    """Packed weights and a router in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.first = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.second = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        out = torch.zeros_like(x)
        for e in ids.unique():
            token, slot = torch.where(ids == e)
            y = F.linear(F.relu(F.linear(x[token], self.first[e])), self.second[e])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), experts

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        return self.experts(x, ids, weights)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_recognized(transposed: bool, interleaved: bool, gated: bool) -> None:
    torch.manual_seed(0)
    layer = Layer(Packed(transposed, interleaved, gated)).eval()
    x = torch.randn(19, WIDTH)
    with torch.no_grad():
        wanted = layer(x)
        report = prepare(layer)
        (one,) = report.changed
        assert (one.path, one.family, one.num_experts) == ("experts", "nonzero_loop", EXPERTS)
        assert (one.activation, one.gated, one.verified) == ("silu" if gated else "gelu", gated, True)
        got, calls = compiled(layer, x)
        assert calls == ["moeca.experts"]
        torch.testing.assert_close(got, wanted)
        assert not prepare(layer).changed


def test_second_layer_of_the_class_and_meta_device() -> None:
    assert [one.verified for one in prepare(nn.Sequential(Packed(), Packed(interleaved=True))).changed] == [True, True]
    with torch.device("meta"):
        model = Packed()
    assert [one.verified for one in prepare(model).changed] == [False]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Clamped(), "not the gate-weighted sum of (gated) MLPs read from first (4, 48, 16), second (4, 16, 24)"),
        (Inline(), "forward takes (x), not just tokens, ids and gate weights, each required"),
    ],
)
def test_left_alone_with_a_reason(model: nn.Module, reason: str) -> None:
    (miss,) = prepare(model).rejected
    assert reason in miss.reason


def test_parameters_of_another_shape_are_no_experts() -> None:
    layer = Packed()
    layer.second = nn.Parameter(torch.zeros(EXPERTS, WIDTH + 1, HIDDEN + 1))
    (miss,) = prepare(layer).rejected
    assert "don't chain into a (gated) MLP" in miss.reason
    layer.second = nn.Parameter(torch.zeros(EXPERTS + 1, WIDTH, HIDDEN))
    (miss,) = prepare(layer).rejected
    assert "for different numbers of experts" in miss.reason


def test_quantized_weights_are_refused() -> None:
    layer = Packed().to(torch.float8_e4m3fn)
    (miss,) = prepare(layer).rejected
    assert "quantized or sharded weights (first is a Parameter of torch.float8_e4m3fn)" in miss.reason
