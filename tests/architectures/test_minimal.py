"""What generated models showed the finder to do wrongly once, each as small as it gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_compile.pipeline import Analysis
from tests.passes.blocks import DIM, Attention, Routed, Timed, latent, times
from tests.tools import analyze_module

Core = Callable[[Tensor, Tensor], Tensor]
W, V = torch.randn(DIM, DIM), torch.randn(DIM, DIM)


def kinds(analysis: Analysis) -> list[str]:
    return [region.kind for region in analysis.facts.regions]


def reasons(analysis: Analysis) -> list[str]:
    return [miss.reason for miss in analysis.facts.rejected]


def mlp(x: Tensor) -> Tensor:
    return (x @ W.to(x.dtype)).tanh() @ V.to(x.dtype)


def test_a_residual_added_in_float32() -> None:
    """Wan and others: `(hidden.float() + y * gate).type_as(hidden)`."""
    analysis = analyze_module(lambda x: (x.float() + mlp(x).float()).to(x.dtype), latent().bfloat16())
    assert kinds(analysis) == ["mlp"]


def test_the_cut_of_a_residual_added_in_float32_is_in_the_branch_s_dtype() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return (x.float() + t.sin().sum() * mlp(x).float()).to(x.dtype)

    (region,) = analyze_module(model, latent().bfloat16(), times()).facts.regions
    assert region.dtypes == ("bfloat16",)


def test_a_residual_added_in_another_shape() -> None:
    analysis = analyze_module(lambda x: (x.flatten(0, 1) + mlp(x).flatten(0, 1)).view(x.shape), latent())
    assert kinds(analysis) == ["mlp"]


def test_an_added_long_skip_between_views_is_a_residual_around_others() -> None:
    def model(x: Tensor) -> Tensor:
        early = (x.flatten(0, 1) + mlp(x).flatten(0, 1)).view(x.shape)
        late = (early.flatten(0, 1) + mlp(early).flatten(0, 1)).view(x.shape)
        return late + early

    analysis = analyze_module(model, latent())
    assert kinds(analysis) == ["mlp", "mlp"]
    (reason,) = reasons(analysis)
    assert reason.startswith("a residual around")


def test_two_gated_branches_summed_first_are_cut_before_their_gates() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        g, h = t.sin().view(-1, 1, 1), t.cos().view(-1, 1, 1)
        return x + (g * F.scaled_dot_product_attention(x @ W, x, x) + h * mlp(x))

    assert kinds(analyze_module(model, latent(), times())) == ["attention", "mlp"]


def test_a_residual_around_the_whole_model_is_a_miss() -> None:
    """Forecasting that region would throw away what an attention-only row computes."""
    into, out = torch.randn(DIM, 16), torch.randn(16, DIM)

    def model(x: Tensor) -> Tensor:
        h = x @ into
        h = h + F.scaled_dot_product_attention(h, h, h)
        return x + (h + (h @ out).tanh() @ into) @ out

    assert kinds(analyze_module(model, latent())) == ["attention", "mlp"]


class FastPath(nn.Module):
    """An MLP with a depthwise convolution that has a shortcut of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 24), nn.Linear(24, DIM)
        self.conv = nn.Conv1d(24, 24, 3, padding=1, groups=24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(F.silu(h + self.conv(h.mT).mT))


def test_a_small_residual_inside_a_branch_is_a_part_of_it() -> None:
    shortcut = FastPath()
    analysis = analyze_module(lambda x: x + shortcut(x), latent())
    (region,) = analysis.facts.regions
    assert len(region.parameters) == 6
    assert reasons(analysis) == []


def test_a_small_residual_inside_a_branch_that_is_a_miss_is_no_region() -> None:
    shortcut = FastPath()
    analysis = analyze_module(lambda x: torch.add(x, shortcut(x), alpha=0.5), latent())
    assert kinds(analysis) == []


class Dense(nn.Module):
    """A mixture of experts without a dispatch: all of them on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(DIM, 3), nn.Parameter(torch.randn(3, DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        best, ids = self.router(x).softmax(-1).topk(2)
        gates = x.new_zeros(*x.shape[:2], 3).scatter(-1, ids, best)
        return torch.einsum("nte,nted->ntd", gates, torch.einsum("ntd,edh->nteh", x, self.up))


def test_attention_and_a_traceable_moe_layer_in_one_branch_are_a_span() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.moe = Attention(), Dense()

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + (self.attn(x) + self.moe(x))

    assert kinds(analyze_module(Timed(Parallel()), latent(), times())) == ["span"]


def in_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def by_mask(y: Tensor, gates: Tensor) -> Tensor:
    return y * gates.mT.unsqueeze(-1)


def by_einsum(y: Tensor, gates: Tensor) -> Tensor:
    return torch.einsum("nhtd,nth->nhtd", y, gates)


@pytest.mark.parametrize("core", [in_one, written_out])
@pytest.mark.parametrize("choose", [by_mask, by_einsum])
def test_a_mixture_of_heads_is_one_however_it_is_written(choose: Core, core: Callable[..., Tensor]) -> None:
    """MoH, arXiv 2410.11842: a top-k over heads, as a mask on all of them."""

    class Heads(Attention):
        def __init__(self) -> None:
            super().__init__(core)
            self.router = nn.Linear(DIM, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.router(x).softmax(-1)
            best, ids = scores.topk(1)
            gates = torch.zeros_like(scores).scatter(-1, ids, best)
            return self.proj(choose(self.core(*self.heads(x)), gates).transpose(1, 2).flatten(2))

    heads = Heads()
    (region,) = analyze_module(lambda x: x + heads(x), latent()).facts.regions
    assert [router.choice for router in region.routers] == ["head"]


def test_a_choice_in_groups_is_token_choice() -> None:
    """DeepSeek-V3's own code masks the groups in the shape [tokens, groups, experts of a group]."""

    class Grouped(Routed):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.router(x).softmax(-1).unflatten(-1, (2, 2))
            best = scores.amax(-1).topk(1)[1]
            closed = torch.ones(x.shape[0], 2).scatter(1, best, 0.0).bool()
            weights, ids = scores.masked_fill(closed.unsqueeze(-1), 0.0).flatten(1).topk(self.top_k)
            return weights, ids

    layer = Grouped(experts=4)
    (region,) = analyze_module(lambda x: x + layer(x), latent()).facts.regions
    assert [(router.choice, router.num_experts, router.top_k) for router in region.routers] == [("token", 4, 2)]
