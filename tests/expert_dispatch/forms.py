"""MoE layers that route whole samples, and others that can be traced as they are. Sizes as in `layers`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.expert_dispatch.layers import EXPERTS, HIDDEN, TOP_K, WIDTH, Layer
from tests.models import SwiGLU


class BySample(nn.Module):
    """The gate reads an embedding of the timestep, one choice for a whole sample; a mask picks an expert's samples."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, EXPERTS))
        self.experts = nn.ModuleList(SwiGLU(WIDTH, HIDDEN) for _ in range(EXPERTS))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        weights, ids = self.gate(t).softmax(-1).topk(TOP_K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sample, slot = torch.where(ids == e)
            if sample.numel() > 0:
                out.index_add_(0, sample, expert(x[sample]) * weights[sample, slot, None, None])
        return 1 + out


class BySortedSample(BySample):
    """Routing of whole samples, sorted by expert and their numbers read back (Switch-DiT)."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        weights, ids = self.gate(t).softmax(-1).topk(TOP_K)
        order = ids.flatten().argsort()
        sizes = torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
        sample = order // TOP_K
        parts = x[sample].split(sizes, dim=0)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, sample, y * weights.flatten()[order, None, None])


class BySampleDense(BySample):
    """Routing of whole samples, with a weight for every expert."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        probs = self.gate(t).softmax(-1)
        ids = probs.topk(TOP_K)[1]
        out = torch.zeros_like(x)
        for e in ids.unique():
            sample = (ids == e).any(-1).nonzero().squeeze(-1)
            out[sample] += self.experts[e](x[sample]) * probs[sample, e].view(-1, 1, 1)
        return out


class Parallel(torch.autograd.Function):
    """One linear layer per expert over rows sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([part @ w for part, w in zip(x.split(sizes.tolist()), weight, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        raise NotImplementedError


class Opaque(nn.Module):
    """The experts hide in an autograd function that reads their numbers of rows back (Switch-DiT's own)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        ids = self.router(flat).argmax(-1)
        order = ids.argsort()
        sizes = F.one_hot(ids, EXPERTS).sum(0)
        return (
            torch.empty_like(flat).index_copy(0, order, Parallel.apply(flat[order], sizes, self.weight)).view(x.shape)
        )


class DynamicK(Layer):
    """DiffMoE: an expert takes as many tokens of the whole batch as a threshold says."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        scores = self.router(flat).sigmoid()
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            count = (scores[:, e] > 0.5).sum()
            best, rows = torch.topk(scores[:, e], k=int(count))
            out[rows] += best[:, None] * expert(flat[rows])
        return out.reshape(x.shape)


class Einsum(nn.Module):
    """Packed weights [E, ., .] in einsums: every expert on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        share = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, ids, weights)
        hidden = F.gelu(torch.einsum("ntd,eid->ntei", x, self.up))
        return torch.einsum("ntei,edi,nte->ntd", hidden, self.down, share)


class Grouped(Einsum):
    """Expert choice with as many tokens for each expert, in one grouped multiplication."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        count = flat.shape[0] // EXPERTS
        weights, rows = self.router(flat).float().softmax(-1).topk(count, dim=0)
        ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * count
        picked = flat[rows.t().flatten()]
        hidden = F.gelu(F.grouped_mm(picked, self.up.transpose(1, 2), offs=ends))
        y = F.grouped_mm(hidden, self.down.transpose(1, 2), offs=ends) * weights.t().reshape(-1, 1).to(x.dtype)
        return torch.zeros_like(flat).index_add(0, rows.t().flatten(), y).view(x.shape)


class StaticSplit(Layer):
    """Expert choice, in parts of sizes that are known from the start."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, rows = self.router(flat).softmax(-1).topk(3, dim=0)
        parts = flat[rows.t().flatten()].split([3] * EXPERTS)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(flat).index_add(0, rows.t().flatten(), y * weights.t().reshape(-1, 1)).view(x.shape)


class StaticMask(Layer):
    """Every expert on every token, weighted by a comparison of ids: masks, but as numbers."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            share = torch.where(ids == e, weights, 0.0).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return out


class TwoLists(nn.Module):
    """Two lists of linear layers that are no experts: heads for several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(3))
        self.second = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for one, two in zip(self.first, self.second, strict=True):
            x = x + two(F.relu(one(x)))
        return x


class HashTable(nn.Module):
    """A hash grid of several levels: integer ids, a stack of tables, a weighted sum, and no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Embedding(32, WIDTH) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.sum(-1) * 7).long() % 32
        return x + sum((table(ids * (i + 1) % 32) / (i + 1) for i, table in enumerate(self.levels)), torch.zeros(()))


class HashLookup(HashTable):
    """The same, level by level where a mask says so."""

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.sum(-1) * 7).long() % 32
        level = ids % EXPERTS
        out = torch.zeros_like(x)
        for i, table in enumerate(self.levels):
            hit = level == i
            if hit.any():
                out[hit] = table(ids[hit])
        return out
