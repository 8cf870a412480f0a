"""MoE layers in further dispatch styles: some to be recognized, some that look like it and must be left alone.

All map tokens (N,T,D) -> (N,T,D) with D = 16, E = 4 experts, K = 2 of them per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import SwiGLU

WIDTH, HIDDEN, EXPERTS, TOP_K = 16, 24, 4, 2


class Layer(nn.Module):
    """A router and experts; `dispatch` is the style."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts: Any = nn.ModuleList(SwiGLU(WIDTH, HIDDEN) for _ in range(EXPERTS))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        return ids, weights

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        return self.dispatch(tokens, *self.route(tokens)).reshape(x.shape)

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise AssertionError


class OneHot(Layer):
    """DeepSeek-V3 in transformers 4: adds up in the weights' dtype."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x, dtype=weights.dtype)
        masks = F.one_hot(ids, num_classes=EXPERTS).permute(2, 0, 1)
        for e in range(EXPERTS):
            expert = self.experts[e]
            token, slot = torch.where(masks[e])
            if token.numel() > 0:
                out.index_add_(0, token, expert(x[token]) * weights[token, slot].unsqueeze(-1))
        return out.type(x.dtype)


class Outputs(Layer):
    """DeepSeek's own code: the segments' results are collected in a list, then put back in order."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = torch.zeros(ids.shape[0], EXPERTS, device=x.device).scatter_(1, ids, 1).sum(0).long().cpu().numpy()
        order = ids.view(-1).argsort()
        rows, outputs, start = x[order // ids.shape[1]], [], 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            outputs.append(self.experts[e](rows[start : start + count]))
            start += count
        y = torch.cat(outputs)
        y = torch.empty_like(y).index_copy_(0, order, y)
        return (y.view(*ids.shape, -1).to(weights.dtype) * weights.unsqueeze(-1)).sum(1).to(y.dtype)


class Batched(Layer):
    """Tokens, ids and weights keep their batch axis."""

    def forward(self, x: Tensor) -> Tensor:
        return self.dispatch(x, *self.route(x))

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sample, token, slot = (ids == e).nonzero(as_tuple=True)
            if sample.numel():
                out[sample, token] += expert(x[sample, token]) * weights[sample, token, slot, None]
        return out


class Swapped(Layer):
    """Another order of arguments, and weights for all experts."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        scores = self.router(tokens).sigmoid()
        return self.run(scores, scores.topk(TOP_K)[1], tokens).reshape(x.shape)

    def run(self, scores: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = (ids == e).any(-1).nonzero().squeeze(-1)
            out[token] += expert(x[token]) * scores[token, e].unsqueeze(-1)
        return out


class Named(nn.ModuleDict):
    """The experts' container has the dispatch (Switch Transformer, NLLB)."""

    def __init__(self) -> None:
        super().__init__({f"expert_{e}": SwiGLU(WIDTH, HIDDEN) for e in range(EXPERTS)})

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self[f"expert_{e}"](x[token]) * weights[token, slot, None])
        return out


class Container(Layer):
    """The experts' own container has the dispatch (Switch Transformer, NLLB)."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Named()

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, ids, weights)


class SlotBySlot(Layer):
    """Inline; one loop over the slots around the loop over the experts."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        ids, weights = self.route(tokens)
        out = torch.zeros_like(tokens)
        for k in range(TOP_K):
            for e in range(EXPERTS):
                mask = ids[:, k] == e
                if mask.any():
                    out[mask] += weights[mask, k : k + 1] * self.experts[e](tokens[mask])
        return out.reshape(x.shape)


class Masked(Layer):
    """Inline; boolean masks from a one-hot, and no branch on them."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        ids, weights = self.route(tokens)
        chosen = F.one_hot(ids, EXPERTS).bool()
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            mask = chosen[..., e]
            rows = mask.any(-1)
            out[rows] = out[rows] + expert(tokens[rows]) * weights[mask].unsqueeze(-1)
        return out.reshape(x.shape)


class TopOne(Layer):
    """Inline; one expert per token, whose score is read from those of all."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        probs = self.router(tokens).softmax(-1)
        winner = probs.argmax(-1)
        out = torch.empty_like(tokens).zero_()
        for e, expert in enumerate(self.experts):
            rows = torch.nonzero(winner == e)[:, 0]
            out = out.index_add(0, rows, expert(tokens[rows]) * probs[rows, e].unsqueeze(1))
        return out.reshape(x.shape)


class Viewed(Layer):
    """Inline; the loop fills a view of what is returned."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x.reshape(-1, WIDTH))
        out = torch.zeros_like(x)
        flat, tokens = out.view(-1, WIDTH), x.reshape(-1, WIDTH)
        with torch.no_grad():
            masks = F.one_hot(ids, num_classes=EXPERTS).permute(2, 1, 0)
            hit = (masks.sum((-1, -2)) > 0).nonzero()
        for e in hit:
            slot, token = torch.where(masks[e].squeeze(0))
            flat.index_add_(0, token, self.experts[e](tokens[token]) * weights[token, slot, None])
        return out


class Base(Layer):
    """Inline; the loop fills what a returned view looks at."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        ids, weights = self.route(tokens)
        flat = torch.zeros_like(tokens)
        out = flat.view(x.shape)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            flat.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return out


class Optional(Layer):
    """Inline, and only where `sparse` is set."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        if not self.sparse:
            return self.experts[0](x)
        ids, weights = self.route(tokens)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return out.view_as(x)


class Private(TopOne):
    """Inline; a name-mangled attribute, zero-argument super() and a default stay what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.__scale = 0.5

    def forward(self, x: Tensor, power: int = 2) -> Tensor:
        tokens = x.reshape(-1, WIDTH) * self.__scale**power
        ids, weights = super().route(tokens)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return out.reshape(x.shape) / self.__scale


class Conditioned(Layer):
    """Inline; the router also reads a vector per sample."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        ids, weights = self.route((x + c[:, None]).reshape(-1, WIDTH))
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return out.view_as(x)


class TrainingLoop(Layer):
    """Only training runs the loop; inference uses a method of its own."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x.reshape(-1, WIDTH))
        if not self.training:
            return OneHot.dispatch(self, x.reshape(-1, WIDTH), ids, weights).reshape(x.shape)
        repeated, flat = x.reshape(-1, WIDTH).repeat_interleave(TOP_K, 0), ids.reshape(-1)
        y = torch.empty_like(repeated)
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(repeated[flat == e])
        return (y.view(-1, TOP_K, WIDTH) * weights.unsqueeze(-1)).sum(1).reshape(x.shape)


class Capacity(Layer):
    """An expert takes 10 tokens at most; the others get nothing from it."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            token, slot = token[:10], slot[:10]
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class Counting(OneHot):
    """Keeps statistics while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(EXPERTS))

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            self.load[e] += token.numel()
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class Squared(Layer):
    """Not a weighted sum."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, (expert(x[token]) * weights[token, slot, None]).square())
        return out


class Listed(Layer):
    """Inline; the results are collected in a list."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        ids, weights = self.route(tokens)
        parts, rows = [], []
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            parts.append(expert(tokens[token]) * weights[token, slot, None])
            rows.append(token)
        return torch.zeros_like(tokens).index_add(0, torch.cat(rows), torch.cat(parts)).reshape(x.shape)


def doubled(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def wrapper(*args: Any) -> Tensor:
        return 2 * method(*args)

    return wrapper


class Decorated(Layer):
    """Inline, and a decorator changes the result."""

    @doubled
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        ids, weights = self.route(tokens)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return out.view_as(x)


class Stacked(nn.Module):
    """Layers, not experts: each one's output is the next one's input, up to a depth read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SwiGLU(WIDTH, HIDDEN) for _ in range(EXPERTS))

    def forward(self, x: Tensor, depth: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i < depth.item():
                x = x + layer(x)
        return x


class StaticSlices(Layer):
    """Expert choice: every expert takes as many tokens, so nothing depends on data."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, rows = self.router(tokens).softmax(-1).topk(3, dim=0)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            out = out.index_add(0, rows[:, e], expert(tokens[rows[:, e]]) * weights[:, e : e + 1])
        return out.reshape(x.shape)
