"""MoE layers whose experts take more than the tokens: a value for each of them. Sizes as in `layers`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.expert_dispatch.layers import EXPERTS, HIDDEN, TOP_K, WIDTH


class TimeAware(nn.Module):
    """adaLN from the token's condition, the hidden values scaled by another one, and the input added."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm, self.ada = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, channels: Tensor) -> Tensor:
        shift, scale, gate = self.ada(c).chunk(3, dim=-1)
        return x + gate * self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)) * channels)


class Conditioned(nn.Module):
    """Diff-MoE: experts take an embedding of the timestep and a summary of the sample with each token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(TimeAware() for _ in range(EXPERTS))
        self.summary = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Sigmoid())

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        channels = self.summary(x.mean(1)).repeat_interleave(x.shape[1], dim=0)
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K, dim=-1, sorted=False)
        tokens, c = x.reshape(-1, WIDTH), c.repeat_interleave(x.shape[1], dim=0)
        flat = ids.view(-1)
        if self.training:
            tokens, c = (one.repeat_interleave(TOP_K, dim=0) for one in (tokens, c))
            y = torch.empty_like(tokens)
            for e, expert in enumerate(self.experts):
                y[flat == e] = expert(tokens[flat == e], c[flat == e], channels[flat == e])
            return y
        return self.infer(tokens, c, flat, weights.view(-1, 1), channels).view(x.shape)

    @torch.no_grad()
    def infer(self, x: Tensor, c: Tensor, flat_ids: Tensor, flat_weights: Tensor, channels: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        order = flat_ids.argsort()
        ends = flat_ids.bincount().cpu().numpy().cumsum(0)
        token = order // TOP_K
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start == end:
                continue
            rows = token[start:end]
            y = self.experts[e](x[rows], c[rows], channels[rows])
            y.mul_(flat_weights[order[start:end]])
            out = out.to(y.dtype)
            out.scatter_reduce_(0, rows.view(-1, 1).repeat(1, x.shape[-1]), y, reduce="sum")
        return out


class ConditionedList(Conditioned):
    """The same with the results in a list, put back in order."""

    @torch.no_grad()
    def infer(self, x: Tensor, c: Tensor, flat_ids: Tensor, flat_weights: Tensor, channels: Tensor) -> Tensor:
        order = flat_ids.argsort()
        counts = flat_ids.bincount(minlength=EXPERTS).tolist()
        parts = [one[order // TOP_K].split(counts) for one in (x, c, channels)]
        results = []
        for expert, rows, condition, scale in zip(self.experts, *parts, strict=True):
            results.append(expert(rows, condition, scale))
        y = torch.cat(results) * flat_weights[order]
        return torch.zeros_like(x).index_add(0, order // TOP_K, y)


class OneForAll(TimeAware):
    """Its condition is one value for all tokens, not one for each."""

    def forward(self, x: Tensor, c: Tensor, channels: Tensor) -> Tensor:
        return super().forward(x, c.mean(0, keepdim=True), channels)


class FourArguments(TimeAware):
    """Takes more than is known."""

    def forward(self, x: Tensor, c: Tensor, channels: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, c, channels) + more
