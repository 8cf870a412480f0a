"""A small transformer whose experts are spread over ranks: functional collectives carry the tokens there and back."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, distributed, nn


class ExchangedMoE(nn.Module):
    """K of E experts, of which each rank has E / R, by GShard's dispatch: an expert takes up to C rows of each rank.

    Shapes: M tokens of this rank, D width, I width of an expert.
    """

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int, capacity: int, ranks: int) -> None:
        super().__init__()
        self.router, local = nn.Linear(dim, experts, bias=False), experts // ranks
        self.up = nn.Parameter(torch.randn(local, dim, hidden) / math.sqrt(dim))
        self.down = nn.Parameter(torch.randn(local, hidden, dim) / math.sqrt(hidden))
        self.top_k, self.capacity, self.ranks = top_k, capacity, ranks

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
        gates, ids = self.router(tokens).softmax(-1).topk(self.top_k, -1)
        chosen = F.one_hot(ids, self.router.out_features).float()  # [M, K, E]
        order = (chosen.flatten(0, 1).cumsum(0) - 1).view_as(chosen)  # a branch's place among those of its expert
        place = (order * chosen).sum(-1).long().clamp(max=self.capacity)
        at = F.one_hot(place, self.capacity + 1)[..., :-1].float()  # [M, K, C]
        sent = torch.einsum("mke,mkc,md->ecd", chosen, at, tokens).flatten(0, 1)  # [E C, D]
        arrived = exchanged(sent).view(self.ranks, -1, self.capacity, width).transpose(0, 1).flatten(1, 2)
        done = F.gelu(arrived @ self.up) @ self.down  # [E / R, R C, D]
        back = done.view(-1, self.ranks, self.capacity, width).transpose(0, 1).reshape(sent.shape)
        weights = torch.einsum("mk,mke,mkc->mec", gates, chosen, at)
        return torch.einsum("mec,ecd->md", weights, exchanged(back).view(-1, self.capacity, width)).view_as(x)


def exchanged(rows: Tensor) -> Tensor:
    """Each rank's part of the rows goes to that rank."""
    result: Any = collectives.all_to_all_single(rows, None, None, distributed.group.WORLD)
    return result


class ExchangedDiT(nn.Module):
    """x (N, T, 4), t (N,) -> (N, T, 4)."""

    def __init__(self, ranks: int, depth: int = 2, dim: int = 16, experts: int = 4, capacity: int = 32) -> None:
        super().__init__()
        self.embed, self.time, self.out = nn.Linear(4, dim), nn.Linear(64, dim), nn.Linear(dim, 4)
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(depth))
        self.proj = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.moe = nn.ModuleList(ExchangedMoE(dim, 24, experts, 2, capacity, ranks) for _ in range(depth))
        self.ada = nn.ModuleList(nn.Linear(dim, 4 * dim) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(32) / 32)
        c = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        h = self.embed(x)
        for qkv, proj, moe, ada in zip(self.qkv, self.proj, self.moe, self.ada, strict=True):
            scale, gate, scale_moe, gate_moe = ada(F.silu(c))[:, None].chunk(4, -1)
            q, k, v = (
                qkv(F.layer_norm(h, h.shape[-1:]) * (1 + scale)).view(*h.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
            )
            h = h + gate * proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            h = h + gate_moe * moe(F.layer_norm(h, h.shape[-1:]) * (1 + scale_moe))
        return self.out(h)
