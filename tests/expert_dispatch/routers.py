"""Routers as models ship them, in front of one dispatch. x [M, D] -> ids [M, K], weights [M, K]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import SwiGLU

WIDTH, HIDDEN, EXPERTS, TOP_K, GROUPS = 16, 24, 8, 2, 4
Route = Callable[["Routed", Tensor], tuple[Tensor, Tensor]]


def softmax(layer: Routed, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = layer.scores(x).softmax(-1).topk(TOP_K, sorted=False)
    return ids, weights


def softmax_of_chosen(layer: Routed, x: Tensor) -> tuple[Tensor, Tensor]:
    logits, ids = layer.scores(x).topk(TOP_K)
    return ids, logits.softmax(-1)


def sigmoid(layer: Routed, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = layer.scores(x).sigmoid().topk(TOP_K)
    return ids, weights


def biased(layer: Routed, x: Tensor) -> tuple[Tensor, Tensor]:
    """A bias that only selects."""
    scores = layer.scores(x).sigmoid()
    ids = (scores + layer.bias).topk(TOP_K, sorted=False)[1]
    return ids, scores.gather(1, ids)


def grouped(layer: Routed, x: Tensor) -> tuple[Tensor, Tensor]:
    """Only experts of the two groups with the best pairs (DeepSeek-V3); renormalised and scaled."""
    scores = layer.scores(x).sigmoid()
    choice = scores + layer.bias
    groups = choice.view(-1, GROUPS, EXPERTS // GROUPS).topk(2, dim=-1)[0].sum(-1)
    best = groups.topk(2, dim=-1, sorted=False)[1]
    allowed = torch.zeros_like(groups).scatter_(1, best, 1).bool()
    allowed = allowed.unsqueeze(-1).expand(-1, GROUPS, EXPERTS // GROUPS).reshape(-1, EXPERTS)
    ids = choice.masked_fill(~allowed, float("-inf")).topk(TOP_K, sorted=False)[1]
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * 2.5


def renormalised(layer: Routed, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = layer.scores(x).softmax(-1, dtype=torch.float32).topk(TOP_K)
    weights /= weights.sum(-1, keepdim=True)
    return ids, weights.to(x.dtype)


def scaled(layer: Routed, x: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = sigmoid(layer, x)
    return ids, weights * 2.5


def cosine(layer: Routed, x: Tensor) -> tuple[Tensor, Tensor]:
    """Prototypes."""
    weights, ids = (F.normalize(x, dim=-1) @ F.normalize(layer.project.weight, dim=-1).t()).sigmoid().topk(TOP_K)
    return ids, weights


ROUTERS: dict[str, Route] = {
    f.__name__: f
    for f in (softmax, softmax_of_chosen, sigmoid, biased, grouped, renormalised, scaled, cosine)
}  # fmt: skip


class Routed(nn.Module):
    """(N,T,D) -> (N,T,D) with `shared` experts that see every token."""

    def __init__(self, router: str, shared: int = 0) -> None:
        super().__init__()
        self.router, self.project = router, nn.Linear(WIDTH, EXPERTS, bias=False)
        self.register_buffer("bias", torch.linspace(-0.2, 0.2, EXPERTS))
        self.experts = nn.ModuleList(SwiGLU(WIDTH, HIDDEN) for _ in range(EXPERTS))
        self.shared = nn.ModuleList(SwiGLU(WIDTH, HIDDEN) for _ in range(shared))

    def scores(self, x: Tensor) -> Tensor:
        return self.project(x)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        ids, weights = ROUTERS[self.router](self, tokens)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        for expert in self.shared:
            out = out + expert(tokens)
        return out.reshape(x.shape)


class Interleaved(nn.Module):
    """Dense blocks between the routed ones."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        parts = (Routed("softmax", shared=1) if i % 2 else SwiGLU(WIDTH, HIDDEN) for i in range(depth))
        self.blocks = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(F.layer_norm(x, (WIDTH,)))
        return x
