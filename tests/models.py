"""A small DiT with mixture-of-experts layers, written in each of the dispatch styles that such models ship.

Shapes: N samples, T tokens a sample, D width, E experts, K experts per token, M = N*T. All gates are non-zero as built.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """(N,T,D) -> (N,T,D): a softmax router, E routed experts of which K see a token, and a shared one."""

    def __init__(self, dim: int, hidden: int, num_experts: int, top_k: int, shared: bool) -> None:
        super().__init__()
        self.router, self.top_k = nn.Linear(dim, num_experts, bias=False), top_k
        self.experts = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(num_experts))
        self.shared = SwiGLU(dim, hidden) if shared else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (M,D) -> ids (M,K), weights (M,K)."""
        weights, ids = self.router(x).softmax(dim=-1).topk(self.top_k, dim=-1, sorted=False)
        return ids, weights

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        ids, weights = self.route(tokens)
        routed = self.dispatch(tokens, ids, weights).reshape(x.shape)
        return routed if self.shared is None else routed + self.shared(x)


class NumpyMoE(MoE):
    """Sorted segments with the counts on the host (DiT-MoE, HiDream, TC-DiT)."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.infer(x, ids.reshape(-1), weights.reshape(-1, 1))

    @torch.no_grad()
    def infer(self, x: Tensor, flat_ids: Tensor, flat_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        order, ends = flat_ids.argsort(), flat_ids.bincount().cpu().numpy().cumsum(0)
        token = order // self.top_k
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start == end:
                continue
            rows = token[start:end]
            y = self.experts[e](x[rows]).mul_(flat_weights[order[start:end]])
            out = out.to(y.dtype)
            out.scatter_reduce_(0, rows.view(-1, 1).expand(-1, x.shape[-1]), y, reduce="sum")
        return out


class Blocks(nn.Module):
    """The experts as a module of their own that gets tokens, ids and weights (DSMoE, JiT)."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(num_experts))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        masks = F.one_hot(ids, num_classes=len(self.blocks)).permute(2, 1, 0)
        for e in torch.greater(masks.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(masks[e].squeeze(0))
            y = self.blocks[e](x[None, token].reshape(-1, x.shape[-1])) * weights[token, slot, None]
            out.index_add_(0, token, y.to(x.dtype))
        return out


class NonzeroMoE(MoE):
    """Sigmoid scores, a bias that only selects, renormalised and scaled weights; the loop is in `Blocks`."""

    def __init__(self, dim: int, hidden: int, num_experts: int, top_k: int, shared: bool) -> None:
        super().__init__(dim, hidden, num_experts, top_k, shared)
        self.experts = Blocks(dim, hidden, num_experts)
        self.register_buffer("selection_bias", torch.linspace(-0.05, 0.05, num_experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).sigmoid()
        ids = torch.topk(scores + self.selection_bias, self.top_k, sorted=False)[1]
        weights = scores.gather(1, ids)
        return ids, weights / weights.sum(dim=-1, keepdim=True) * 2.0

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, ids, weights)


class InlineMoE(MoE):
    """Router and loop over the hit experts in one forward (Mixtral in Hugging Face transformers)."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        x = x.view(-1, dim)
        weights = F.softmax(self.router(x), dim=1, dtype=torch.float)
        weights, ids = torch.topk(weights, self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros((batch * length, dim), dtype=x.dtype, device=x.device)
        masks = F.one_hot(ids, num_classes=len(self.experts)).permute(2, 1, 0)
        hit = torch.greater(masks.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            slot, token = torch.where(masks[e].squeeze(0))
            y = self.experts[e](x[None, token].reshape(-1, dim)) * weights[token, slot, None]
            out.index_add_(0, token, y.to(x.dtype))
        return (out if self.shared is None else out + self.shared(x)).reshape(batch, length, dim)


class WhereMoE(MoE):
    """A loop over all experts with torch.where and a branch on an empty result, inline; adds to the shared output."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        ids, weights = self.route(tokens)
        out = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                out[token] += weights[token, slot, None] * expert(tokens[token])
        return out.view_as(x)


class DenseMoE(MoE):
    """Every expert on every token: nothing in it depends on data, so it needs no rewriting."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        share = x.new_zeros(x.shape[0], len(self.experts)).scatter(1, ids, weights)
        return sum(share[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


STYLES: dict[str, type[MoE]] = {
    "numpy": NumpyMoE, "nonzero": NonzeroMoE, "hf": InlineMoE, "where": WhereMoE, "dense": DenseMoE
}  # fmt: skip


class Block(nn.Module):
    """adaLN-Zero: attention, then mixture of experts, each modulated and gated by the conditioning."""

    def __init__(self, dim: int, heads: int, moe: MoE) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads
        self.moe = moe
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def attention(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_moe, scale_moe, gate_moe = self.ada(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate * self.attention(self.norm1(x) * (1 + scale) + shift)
        return x + gate_moe * self.moe(self.norm2(x) * (1 + scale_moe) + shift_moe)


class DiT(nn.Module):
    """x (N,C,S,S), t (N,), y (N,) int labels -> (N,C,S,S)."""

    def __init__(
        self, style: str = "numpy", depth: int = 2, dim: int = 32, heads: int = 4, num_experts: int = 4,
        top_k: int = 2, hidden: int = 48, shared: bool = True, size: int = 8, patch: int = 2, channels: int = 4,
        num_classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.channels, self.embed = patch, channels, nn.Conv2d(channels, dim, patch, patch)
        self.pos = nn.Parameter(torch.randn(1, (size // patch) ** 2, dim) * 0.02)
        self.time = nn.Sequential(nn.Linear(64, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim)
        moes = (STYLES[style](dim, hidden, num_experts, top_k, shared) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(dim, heads, moe) for moe in moes)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.out = nn.Linear(dim, patch * patch * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        n, _, height, width = x.shape
        rates = torch.exp(-math.log(10000) * torch.arange(32, device=x.device) / 32)
        angles = t[:, None].float() * rates
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype)) + self.label(y)
        h = self.embed(x).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            h = block(h, c)
        p = self.patch
        h = self.out(self.norm(h)).reshape(n, height // p, width // p, p, p, self.channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(n, self.channels, height, width)
