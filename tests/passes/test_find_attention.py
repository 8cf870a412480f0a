"""Attention anchors: SDPA and every common way of writing it out; and what only looks like attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_compile.graph import fx
from moeca_compile.pipeline import Analysis
from tests.passes.blocks import DIM, Attention, Block, OneStream, Stack, Timed, TwoStreams, latent, times
from tests.tools import analyze_module, node

MASK = torch.ones(4, 4).tril().bool()
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [one.flatten(0, 1) for one in (q, k, v)]
    return torch.bmm(torch.bmm(flat[0], flat[1].mT).softmax(-1), flat[2]).unflatten(0, q.shape[:2])


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [one.flatten(0, 1) for one in (q, k, v)]
    bias = torch.zeros(1, 4, 4)
    return torch.bmm(torch.baddbmm(bias, flat[0], flat[1].mT, alpha=0.5).softmax(-1), flat[2]).unflatten(0, q.shape[:2])


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("nhqd,nhkd->nhqk", q, k).div(2).softmax(-1)
    return torch.einsum("nhqk,nhkd->nhqd", weights, v)


def with_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A learned score that no key has: gpt-oss."""
    scores = torch.cat([q @ k.mT, torch.full((*q.shape[:3], 1), 0.3)], dim=-1)
    return (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def with_a_sink_of_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax1: one more in the denominator."""
    return F.pad(q @ k.mT, (1, 0)).softmax(-1).narrow(-1, 1, k.shape[2]) @ v


WRITINGS: dict[str, Core] = {
    "sdpa": F.scaled_dot_product_attention,
    "sdpa, masked": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASK),
    "sdpa, dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
    "matmul": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "scaled after": lambda q, k, v: (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v,
    "scaled before": lambda q, k, v: ((q * 0.5) @ (k * 0.5).mT).softmax(-1) @ v,
    "scaled and biased": lambda q, k, v: (q @ k.mT * 0.5 + torch.zeros(4, 4)).softmax(-1) @ v,
    "masked_fill": lambda q, k, v: (q @ k.mT * 0.5).masked_fill(~MASK, -math.inf).softmax(-1) @ v,
    "where": lambda q, k, v: torch.where(MASK, q @ k.mT, torch.tensor(-1e9)).softmax(-1) @ v,
    "softmax in float32": lambda q, k, v: (q @ k.mT).float().softmax(-1).to(v.dtype) @ v,
    "softmax by dtype": lambda q, k, v: F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(v.dtype) @ v,
    "dropout": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, training=False) @ v,
    "largest subtracted": lambda q, k, v: (q @ k.mT - 3.0).softmax(-1) @ v,
    "bmm": by_bmm,
    "baddbmm": by_baddbmm,
    "einsum": by_einsum,
    "a sink": with_a_sink,
    "a sink of zero": with_a_sink_of_zero,
}


def found(core: Core) -> Analysis:
    return analyze_module(Timed(Block(mixer=Attention(core))), latent(), times())


def test_every_writing_is_one_attention_and_one_region() -> None:
    """A stack of blocks, each with its own writing."""
    blocks = Stack(*(Block(mixer=Attention(core)) for core in WRITINGS.values()))
    analysis = analyze_module(Timed(blocks), latent(), times())
    regions = {region.key: region for region in analysis.facts.regions}
    assert len(analysis.facts.attention) == len(WRITINGS)
    for i, (name, info) in enumerate(zip(WRITINGS, analysis.facts.attention, strict=True)):
        region = regions[f"body.blocks.{i}.attn"]
        assert (region.kind, region.layer, region.attention) == ("attention", i, (info,)), name
        for one in fx.resolve(analysis.gm, (info.query, info.key, info.value, info.node)):
            assert math.prod(fx.shape(one)) == 2 * 4 * DIM, name


def test_in_half_precision_too() -> None:
    writings = [WRITINGS[name] for name in ("matmul", "softmax in float32", "softmax by dtype", "dropout")]
    blocks = Timed(Stack(*(Block(mixer=Attention(core)) for core in writings))).bfloat16()
    analysis = analyze_module(blocks, latent().bfloat16(), times().bfloat16())
    assert [r.kind for r in analysis.facts.regions] == ["attention", "mlp"] * len(writings)


def test_query_key_and_value_are_those_of_the_call() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.sin(), k.cos(), v.tanh())

    analysis = found(core)
    (info,) = analysis.facts.attention
    assert (info.query, info.key, info.value) == ("sin_1", "cos_1", "tanh")
    assert node(analysis.gm, info.node).target is fx.SDPA


def test_query_key_and_value_are_those_of_the_products() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.sin() @ k.cos().mT * 0.5).softmax(-1) @ v.tanh()

    analysis = found(core)
    (info,) = analysis.facts.attention
    query, key, value = (fx.strip(node(analysis.gm, n), fx.is_view) for n in (info.query, info.key, info.value))
    assert (query.target, key.target, value.target) == (fx.aten.sin.default, fx.aten.cos.default, fx.aten.tanh.default)


def test_cross_attention_is_attention() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            k, v = self.kv(c.unsqueeze(1).sin()).chunk(2, dim=-1)
            return x + F.scaled_dot_product_attention(self.q(x), k, v)

    context = analyze_module(Timed(Cross()), latent(), times()).facts
    assert [(r.key, r.kind) for r in context.regions] == [("body.q", "attention")]


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (TwoStreams(), 1),
        (OneStream(), 1),
        (Stack(Block(), Block()), 2),
        (Stack(Block(mixer=Attention(WRITINGS["matmul"])), Block(mixer=Attention(by_bmm))), 2),
    ],
    ids=["two streams", "one stream", "two blocks", "two written out"],
)
def test_each_attention_is_found_once(body: nn.Module, count: int) -> None:
    assert len(analyze_module(Timed(body), latent(), times()).facts.attention) == count


NOT_ATTENTION: dict[str, Core] = {
    "linear attention": lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
    "no softmax": lambda q, k, v: (q @ k.mT).relu() @ v,
    "sigmoid": lambda q, k, v: (q @ k.mT).sigmoid() @ v,
    "softmax of the product of both": lambda q, k, v: ((q @ k.mT) @ v).softmax(-1),
    "softmax of no product": lambda q, k, v: q + ((q * k).softmax(-1).mT @ v).mean(),
    "a norm between": lambda q, k, v: F.layer_norm((q @ k.mT).softmax(-1), (4,)) @ v,
}


def test_what_only_looks_like_attention_is_none() -> None:
    analysis = analyze_module(
        Timed(Stack(*(Block(mixer=Attention(core)) for core in NOT_ATTENTION.values()))), latent(), times()
    )
    assert analysis.facts.attention == ()
    regions = analysis.facts.regions
    assert [(r.kind, r.layer) for r in regions] == [x for i in range(len(NOT_ATTENTION)) for x in (("mlp", i),) * 2]


def test_a_dense_mixture_is_no_attention() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(DIM, 3), nn.Linear(DIM, 3 * DIM)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.router(x).softmax(-1).unsqueeze(-2)
            return x + (weights @ self.experts(x).unflatten(-1, (3, DIM))).squeeze(-2)

    context = analyze_module(Dense(), latent()).facts
    assert context.attention == ()
    assert [region.kind for region in context.regions] == ["mlp"]


# -- whose keys they are ----------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """x attends to what `keys` makes of the stream and the prompt."""

    def __init__(self, keys: Callable[[Attending, Tensor, Tensor, Tensor], Tensor], joint: bool = False) -> None:
        super().__init__()
        self.norm, self.other, self.text = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.Linear(6, DIM)
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.q_norm, self.mod = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
        self.keys, self.joint = keys, joint

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        angles = t[:, None] * torch.arange(1, DIM // 2 + 1)
        c = self.mod(torch.cat([angles.sin(), angles.cos()], dim=-1))[:, None]
        for _ in range(2):  # the second block's streams have met in the first
            h = self.norm(x) * (1 + c)
            keys = self.keys(self, x, h, self.text(prompt))
            asks = torch.cat([keys, h], dim=1) if self.joint else h
            turned = self.q_norm(self.q(asks))
            turned = turned * t.cos().mean() + turned.flip(-1) * t.sin().mean()  # as rotary embeddings do
            y = F.scaled_dot_product_attention(turned, self.k(keys), self.v(keys))
            x = x + c * self.out(y[:, -x.shape[1] :])
        return x


KINDS: dict[str, tuple[Callable[..., Tensor], str, bool]] = {
    "the same tokens": (lambda self, x, h, text: h, "self", False),
    "the same stream, normed otherwise": (lambda self, x, h, text: self.other(x), "self", False),
    "fewer tokens of the same stream": (lambda self, x, h, text: self.other(x[:, ::2]), "self", False),
    "the prompt": (lambda self, x, h, text: text, "cross", True),
    "a normed prompt": (lambda self, x, h, text: self.other(text).tanh(), "cross", True),
    "the prompt, changed by the image": (lambda self, x, h, text: text + self.k(h).mean(1, True), "cross", False),
    "the prompt and the image": (lambda self, x, h, text: torch.cat([text, h], dim=1), "joint", False),
}


@pytest.mark.parametrize("name", KINDS)
def test_where_the_keys_come_from_and_whether_they_change(name: str) -> None:
    keys, kind, invariant = KINDS[name]
    analysis = analyze_module(Attending(keys), latent(), times(), torch.randn(2, 3, 6))
    assert {(one.kind, one.invariant) for one in analysis.facts.attention} == {(kind, invariant)}
    assert len(analysis.facts.attention) == 2


def test_joint_queries_too() -> None:
    model = Attending(lambda self, x, h, text: torch.cat([text, h], dim=1), joint=True)
    analysis = analyze_module(model, latent(), times(), torch.randn(2, 3, 6))
    assert [one.kind for one in analysis.facts.attention] == ["joint"] * 2


def test_a_sequence_of_both_is_one_stream() -> None:
    found = analyze_module(Timed(OneStream()), latent(), times()).facts.attention
    assert [(one.kind, one.invariant) for one in found] == [("self", False)]
