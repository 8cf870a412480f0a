"""A whole model: embeddings, blocks, skips, the layer out, and what may be around all of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.block import Block, LinearInOut, TwoStreams
from tests.architectures.expected import Expected
from tests.architectures.feedforward import Mlp
from tests.architectures.joining import PER_BRANCH, norm
from tests.architectures.parts import CHANNELS, DIM, GRID, PROMPT_DIM, TOKENS, Parts

WAVES, LABELS, PATCH = 8, 10, 2


class Time(nn.Module):
    """t (N,) -> (N,D)."""

    def __init__(self, form: str, residual: bool) -> None:
        super().__init__()
        self.form = form
        rates = torch.exp(-math.log(10000) * torch.arange(WAVES) / WAVES)
        if form == "fourier":
            self.register_buffer("rates", torch.randn(WAVES))
        elif form == "learned fourier":
            self.rates = nn.Parameter(torch.randn(WAVES))
        else:
            self.rates = rates
        self.mlp = nn.Sequential(nn.Linear(2 * WAVES, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.more = Mlp() if residual else None

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.rates * (2 * math.pi if "fourier" in self.form else 1)
        waves = [angles.sin(), angles.cos()] if self.form == "sin, cos" else [angles.cos(), angles.sin()]
        c = self.mlp(torch.cat(waves, dim=-1).to(self.mlp[0].weight.dtype))
        return c if self.more is None else c + self.more(c)


class Model(nn.Module):
    """x (N,C,8,8) or (N,T,4C), t (N,), y (N,) labels, prompt (N,L,P), guidance (N,) -> like x; None where not used."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        patch = PATCH * PATCH * CHANNELS
        by_conv = parts.patch == "conv" and not parts.tokens_in
        self.embed = nn.Conv2d(CHANNELS, DIM, PATCH, PATCH) if by_conv else nn.Linear(patch, DIM)
        self.pos = nn.Parameter(torch.randn(1, TOKENS, DIM) * 0.1)
        self.registers = nn.Parameter(torch.randn(1, parts.registers, DIM)) if parts.registers else None
        self.time = Time(parts.time, parts.time_residual)
        self.guidance = Time("cos, sin", False) if parts.guidance else None
        self.label = nn.Embedding(LABELS, DIM) if parts.condition == "label" else None
        self.pooled = nn.Linear(PROMPT_DIM, DIM) if parts.condition == "pooled prompt" else None
        two = parts.layout.startswith("two")
        self.prompt = nn.Linear(PROMPT_DIM, DIM) if parts.cross or two else None
        self.doubles = parts.depth - 1 if parts.layout == "two streams, then one" else parts.depth if two else 0
        self.blocks = nn.ModuleList(self.block(i) for i in range(parts.depth))
        self.table = (
            nn.Linear(DIM, 12 * DIM) if parts.modulation == "shared table" and parts.gate in PER_BRANCH else None
        )
        self.skip = nn.Linear(2 * DIM, DIM) if parts.skip == "concat" else None
        self.skip_norm = nn.LayerNorm(2 * DIM) if parts.skip == "concat" else None
        self.skip_scale = nn.Parameter(torch.rand(DIM)) if parts.skip == "added, weighted" else None
        self.norm, self.ada, self.out = norm(parts.norm), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, patch)

    def block(self, index: int) -> nn.Module:
        parts = self.parts
        if index < self.doubles:
            return TwoStreams(parts, index, last=index == parts.depth - 1)
        single = parts.layout == "linear in and out" or (self.doubles and not parts.dispatch)
        return LinearInOut(parts) if single else Block(parts, index)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        prompt: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        if self.parts.outer == "residual":
            return x + self.inner(x, t, y, prompt, guidance)
        if self.parts.outer == "preconditioned":  # EDM: t is the noise level
            level = t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
            own, wide = 1 / (level**2 + 1), (level**2 + 1).sqrt()
            return own * x + level / wide * self.inner(x / wide, t.log() / 4, y, prompt, guidance)
        return self.inner(x, t, y, prompt, guidance)

    def condition(self, t: Tensor, y: Tensor | None, prompt: Tensor | None, guidance: Tensor | None) -> Tensor:
        c = self.time(t)
        if self.guidance is not None:
            c = c + self.guidance(guidance)
        if self.label is not None:
            c = c + self.label(y)
        return c if self.pooled is None else c + self.pooled(prompt.mean(1))

    def inner(self, x: Tensor, t: Tensor, y: Tensor | None, prompt: Tensor | None, guidance: Tensor | None) -> Tensor:
        c = self.condition(t, y, prompt, guidance)
        shared = None if self.table is None else self.table(F.silu(c))
        text = None if self.prompt is None else self.prompt(prompt)
        h = self.patches(x) + self.pos
        if self.parts.gate not in PER_BRANCH:
            h = h + c.unsqueeze(1)
        if self.registers is not None:
            h = torch.cat([self.registers.expand(h.shape[0], -1, -1), h], dim=1)
        h = h.float() if self.parts.join == "float32 stream" else h
        h = self.run(h, c, shared, text)[:, -TOKENS:].to(x.dtype)
        shift, scale = self.ada(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        return self.unpatched(self.out(self.norm(h) * (1 + scale) + shift), x)

    def run(self, h: Tensor, c: Tensor, shared: Tensor | None, text: Tensor | None) -> Tensor:
        skip = h
        for i, block in enumerate(self.blocks):
            if i == self.parts.depth - 1:
                h = self.long_skip(h, skip)
            if i < self.doubles:
                h, text = block(h, text, c, shared)
                h = torch.cat([text, h], dim=1) if i + 1 == self.doubles < self.parts.depth else h
            else:
                h = block(h, c, shared, text)
            skip = h if i == 0 else skip
        return h

    def long_skip(self, h: Tensor, skip: Tensor) -> Tensor:
        if self.skip is not None:
            return self.skip(self.skip_norm(torch.cat([h, skip], dim=-1).to(self.skip.weight.dtype))).to(h.dtype)
        if self.skip_scale is not None:
            return h + self.skip_scale * skip
        return h + skip if self.parts.skip == "added" else h

    def patches(self, x: Tensor) -> Tensor:
        if self.parts.tokens_in:
            return self.embed(x)
        if self.parts.patch == "conv":
            return self.embed(x).flatten(2).transpose(1, 2)
        n = x.shape[0]
        x = x.view(n, CHANNELS, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 3, 5, 1)
        return self.embed(x.reshape(n, TOKENS, -1))

    def unpatched(self, h: Tensor, x: Tensor) -> Tensor:
        if self.parts.tokens_in:
            return h
        h = h.view(-1, GRID, GRID, PATCH, PATCH, CHANNELS)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(x.shape)

    def expect(self) -> Expected:
        """What must be found in this model: its blocks know; what is around them is here."""
        expected = Expected()
        for i, block in enumerate(self.blocks):
            block.expect(f"blocks.{i}", expected)
        expected.rejected["step only"] += self.parts.time_residual
        expected.rejected["around"] += (self.parts.outer == "residual") + (self.parts.skip == "added")
        return expected
