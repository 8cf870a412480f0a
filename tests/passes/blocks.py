"""Transformer blocks of the kinds that are around, small: the finders must see through all of them.

x [2, 4, 8] is the latent, t [2] the timestep, c [2, 8] what `Timed` makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile.ops.experts  # noqa: F401 - defines moeca::experts
from moeca_compile.pipeline import Analysis
from tests.tools import analyze_module

DIM = 8


def latent() -> Tensor:
    return torch.randn(2, 4, DIM)


def times() -> Tensor:
    return torch.full((2,), 0.5)


class Attention(nn.Module):
    """Two heads; `core` is the part that differs between writings."""

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.core = core

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        n, t, _ = x.shape
        return self.qkv(x).view(n, t, 3, 2, DIM // 2).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.core(*self.heads(x)).transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, hidden), nn.Linear(hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Routed(nn.Module):
    """A router, our operator, the weighted sum, and a shared expert."""

    def __init__(self, shared: bool = True, experts: int = 3, top_k: int = 2, hidden: int = 6) -> None:
        super().__init__()
        self.router, self.top_k = nn.Linear(DIM, experts, bias=False), top_k
        self.up = nn.ParameterList(torch.randn(hidden, DIM) for _ in range(experts))
        self.down = nn.ParameterList(torch.randn(DIM, hidden) for _ in range(experts))
        self.shared = Mlp() if shared else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        return weights, ids

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, DIM)
        weights, ids = self.route(tokens)
        y = torch.ops.moeca.experts(tokens, ids, [*self.up], [*self.down], [], [], [], [], "silu")
        y = (y * weights.unsqueeze(-1)).sum(1).view(x.shape)
        return y if self.shared is None else y + self.shared(x)


class Grouped(Routed):
    """DeepSeek's: first the best groups, then the best experts in them."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        groups = scores.view(-1, 3, 1).amax(-1).topk(2)[1]
        mask = torch.zeros_like(scores).scatter(1, groups, 1.0)
        weights, ids = scores.masked_fill(mask == 0, 0.0).topk(self.top_k)
        return weights, ids


class Timed(nn.Module):
    """A timestep embedding in front of a body."""

    def __init__(self, body: nn.Module | Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.time, self.body = nn.Linear(4, DIM), body

    def forward(self, x: Tensor, t: Tensor) -> Any:
        angles = t[:, None] * torch.tensor([1.0, 2.0])
        return self.body(x, self.time(torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype)))


class Block(nn.Module):
    """Attention and feed-forward; `way` says how each branch joins the trunk."""

    def __init__(self, way: str = "plain", mixer: nn.Module | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.attn, self.mlp, self.way = mixer or Attention(), mlp or Mlp(), way
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.ada, self.scale = nn.Linear(DIM, 4 * DIM), nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate1, shift, gate2, scale = self.ada(F.silu(c)).unsqueeze(1).chunk(4, dim=-1)

        def h(x: Tensor) -> Tensor:
            return self.norm1(x) * (1 + scale) + shift

        match self.way:
            case "plain":
                x = x + self.attn(self.norm1(x))
                return x + self.mlp(self.norm2(x))
            case "gate left":
                x = x + gate1 * self.attn(h(x))
                return x + gate2 * self.mlp(self.norm2(x))
            case "gate right, branch first":
                x = self.attn(h(x)) * gate1 + x
                return self.mlp(self.norm2(x)) * gate2 + x
            case "in place":
                x = x.clone()
                x += gate1 * self.attn(h(x))
                x.add_(self.mlp(self.norm2(x)).mul_(gate2))
                return x
            case "tanh gate":
                x = x + gate1.tanh() * self.attn(h(x))
                return x + gate2.tanh() * self.mlp(self.norm2(x))
            case "layer scale":
                x = x + self.scale * self.attn(self.norm1(x))
                return x + gate2 * (self.scale * self.mlp(self.norm2(x)))
            case "number":
                x = x + 0.5 * self.attn(self.norm1(x))
                return x + self.mlp(self.norm2(x)) * 2
            case "gate behind a view":
                x = x + (gate1.flatten(1).repeat_interleave(4, 0) * self.attn(h(x)).view(-1, DIM)).view(x.shape)
                return x + gate2 * self.mlp(self.norm2(x).flatten(0, 1)).unflatten(0, (2, 4))
            case "post norm":
                x = self.norm1(x + self.attn(x))
                return self.norm2(x + self.mlp(x))
            case "sandwich":
                x = x + gate1 * self.norm1(self.attn(x))
                return x + gate2 * self.norm2(self.mlp(x))
            case "parallel":
                return x + self.attn(h(x)) + self.mlp(h(x))
            case "parallel, gated":
                return x + gate1 * self.attn(h(x)) + gate2 * self.mlp(h(x))
            case "parallel, branches first":
                return self.mlp(h(x)) + (self.attn(h(x)) + x)
            case "parallel, one sum":
                return x + (self.attn(h(x)) + self.mlp(h(x)))
        raise AssertionError(self.way)


WAYS = (
    "plain", "gate left", "gate right, branch first", "in place", "tanh gate", "layer scale", "number",
    "gate behind a view", "post norm", "sandwich", "parallel", "parallel, gated", "parallel, branches first",
)  # fmt: skip


class TwoStreams(nn.Module):
    """MMDiT: image and text tokens with weights of their own share one attention; `last` drops the text stream."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.image, self.text = Attention(), Attention()
        self.image_mlp, self.text_mlp = Mlp(), Mlp()
        self.ada, self.last = nn.Linear(DIM, 4 * DIM), last

    def forward(self, x: Tensor, c: Tensor, text: Tensor | None = None) -> Tensor:
        text = x[:, :3] * 0.1 + c.unsqueeze(1) if text is None else text
        gates = self.ada(c).unsqueeze(1).chunk(4, dim=-1)
        pairs = zip(self.image.heads(x), self.text.heads(text), strict=True)
        both = F.scaled_dot_product_attention(*(torch.cat(pair, dim=2) for pair in pairs))
        both = both.transpose(1, 2).flatten(2)
        x = x + gates[0] * self.image.proj(both[:, : x.shape[1]])
        x = x + gates[1] * self.image_mlp(x)
        if self.last:
            return x
        text = text + gates[2] * self.text.proj(both[:, x.shape[1] :])
        text = text + gates[3] * self.text_mlp(text)
        return torch.cat([x, text], dim=1)


class TextOfItsOwn(nn.Module):
    """Two streams, the text an input: its modulation, not the text, has the batch of the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TwoStreams()

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> Tensor:
        gates = self.block.ada(c).unsqueeze(1).tanh().chunk(4, dim=-1)
        pairs = zip(self.block.image.heads(x), self.block.text.heads(text * (1 + gates[0])), strict=True)
        both = F.scaled_dot_product_attention(*(torch.cat(pair, dim=2) for pair in pairs)).transpose(1, 2).flatten(2)
        x = x + gates[1] * self.block.image.proj(both[:, : x.shape[1]])
        text = text + gates[2] * self.block.text.proj(both[:, x.shape[1] :])
        return torch.cat([x, text + gates[3] * self.block.text_mlp(text)], dim=1)


class OneStream(nn.Module):
    """Flux's single block: attention and feed-forward share the linear in and the linear out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(DIM, 5 * DIM), nn.Linear(3 * DIM, DIM)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q, k, v, h = self.linear1(x).split([DIM, DIM, DIM, 2 * DIM], dim=-1)
        a = F.scaled_dot_product_attention(q, k, v)
        return x + c.unsqueeze(1) * self.linear2(torch.cat([a, F.gelu(h, approximate="tanh")], dim=-1))


class Stack(nn.Module):
    """Blocks one after the other; `around` adds a residual around all of them."""

    def __init__(self, *blocks: nn.Module, around: bool = False) -> None:
        super().__init__()
        self.blocks, self.around = nn.ModuleList(blocks), around

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x, c)
        return x + first if self.around else x


@cache
def analyzed(way: str = "gate left") -> Analysis:
    """A timed block of this way, analyzed once for all tests: they only read it."""
    torch.manual_seed(0)
    return analyze_module(Timed(Block(way)), latent(), times())


@cache
def routed() -> Analysis:
    """Two blocks, attention and routed experts each, the second without a shared expert; only read."""
    torch.manual_seed(0)
    blocks = Stack(Block("gate left", mlp=Routed()), Block("gate left", mlp=Routed(shared=False)))
    return analyze_module(Timed(blocks), latent(), times())


@cache
def two_streams() -> Analysis:
    """One attention with two outputs, and two feed-forwards; only read."""
    torch.manual_seed(0)
    return analyze_module(Timed(TwoStreams()), latent(), times())
