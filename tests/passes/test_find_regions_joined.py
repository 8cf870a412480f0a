"""Residual adds that don't come one after the other: what each region is then, and that nothing counts twice."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from moeca_compile.pipeline import Analysis
from tests.passes.blocks import DIM, Attention, Mlp, Stack, Timed, latent, times
from tests.tools import analyze_module


def analyze(body: nn.Module) -> Analysis:
    return analyze_module(Timed(body), latent(), times())


class Leaping(nn.Module):
    """The second add goes back to the block's input; the first sum is only what the feed-forward sees (AuraFlow)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = Attention(), Mlp(), nn.LayerNorm(DIM)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm(x + c.unsqueeze(1) * self.attn(x))
        return x + c.unsqueeze(1) * self.mlp(h)


def test_what_comes_after_an_inner_add_is_a_region_of_its_own() -> None:
    analysis = analyze(Stack(Leaping(), Leaping()))
    assert [region.kind for region in analysis.facts.regions] == ["attention", "mlp"] * 2
    assert not analysis.facts.rejected
    bodies = [set(region.body) for region in analysis.facts.regions]
    assert not any(a & b for a, b in itertools.combinations(bodies, 2))


class OneMlpForBoth(nn.Module):
    """Attention and feed-forward each run on both streams at once, and each stream adds its part (CogVideoX)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = Attention(), Mlp(), nn.LayerNorm(DIM)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate = c.unsqueeze(1)
        text = x[:, :3] * gate
        both = self.attn(torch.cat([text, x], dim=1))
        text, x = text + gate * both[:, :3], x + gate * both[:, 3:]
        both = self.mlp(self.norm(torch.cat([text, x], dim=1)))
        text, x = text + gate * both[:, :3], x + gate * both[:, 3:]
        return torch.cat([text, x], dim=1)


def test_streams_that_share_a_feed_forward_are_one_region_whose_macs_count_once() -> None:
    analysis = analyze(OneMlpForBoth())
    regions = analysis.facts.regions
    assert [(r.kind, len(r.outputs)) for r in regions] == [("attention", 2), ("mlp", 2)]
    assert sum(r.macs for r in regions) <= regions.total_macs
