"""Skip-DiT: a dense diffusion transformer with long skips, and Skip-Cache, the loop that reuses what lies between them.

Written from the description (Chen et al., "Accelerating Vision Diffusion Transformers with Skip Branches",
arXiv 2411.17616). Block i of the second half first merges the output of block L-1-i of the first half.

    model = load_digits(skips=True)                            # trained by examples/train_skip.py
    images = skip_cache_sample(model, kept=1, interval=3, seed=0)

`SkipCache` is plain eager code without moeca: what `granularity="skip:1"` must equal.
Shapes below: N samples, T tokens, D hidden size, L blocks, s = kept outer blocks on each side.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import digits
from examples.dit_moe import (
    Attention,
    DiTMoE,
    DiTMoEConfig,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    modulate,
    sincos_2d,
)

SKIP_FILE = digits.CHECKPOINTS / "skip_dit.safetensors"
PLAIN_FILE = digits.CHECKPOINTS / "plain_dit.safetensors"


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear: (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DenseBlock(nn.Module):
    """One adaLN-Zero transformer block: attention, then MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N,T,D), conditioning c (N,D) -> (N,T,D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class SkipMerge(nn.Module):
    """The end of a long skip: ``linear(norm(concat[x, skip]))`` replaces x; two (N,T,D) -> (N,T,D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * dim)
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        both, norm = torch.cat([x, skip], dim=-1), self.norm
        # Two features of unlike size share one norm: in half precision its sums would lose the smaller one.
        normed = F.layer_norm(both.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        return self.linear(normed.to(x.dtype))


class SkipDiT(nn.Module):
    """The network; ``skips=False`` is the same without its long skips, a plain DiT.

    mlp_ratio: intermediate size of the MLPs as a multiple of ``hidden_size``.

    Raises:
        ValueError: an odd depth.
    """

    def __init__(
        self,
        depth: int,
        hidden_size: int = 96,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        patch_size: int = 2,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        skips: bool = True,
    ) -> None:
        super().__init__()
        if depth < 2 or depth % 2:
            raise ValueError(f"depth {depth}: each block of the first half needs its partner in the second")
        # What the shared pieces read; the fields about experts mean nothing here.
        self.config = DiTMoEConfig(
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            learn_sigma=False,
        )
        self.grid = input_size // patch_size
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.register_buffer("pos_embed", sincos_2d(hidden_size, self.grid)[None], persistent=False)
        mlp_hidden = int(mlp_ratio * hidden_size)
        self.blocks = nn.ModuleList(DenseBlock(hidden_size, num_heads, mlp_hidden) for _ in range(depth))
        self.merges = nn.ModuleList(SkipMerge(hidden_size) for _ in range(depth // 2 if skips else 0))
        self.final_layer = FinalLayer(self.config)
        self._init_weights()

    # The same code as DiT-MoE's: it reads `config`, `grid` and the names of the modules only.
    unpatchify = DiTMoE.unpatchify
    _init_weights = DiTMoE._init_weights

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (N,C,H,W) float, t (N,) float or int, y (N,) int labels -> (N,C,H,W)."""
        x, c = self.embed(x, t, y)
        return self.finish(self.run(x, c, [], 0, len(self.blocks)), c)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (N,T,D) and the conditioning (N,D)."""
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)

    def run(self, x: Tensor, c: Tensor, skips: list[Tensor], start: int, stop: int) -> Tensor:
        """Blocks start..stop-1. The first half pushes its outputs on `skips`, the second half pops them."""
        half = len(self.blocks) // 2
        for i in range(start, stop):
            if i >= half and len(self.merges):
                x = self.merges[i - half](x, skips.pop())
            x = self.blocks[i](x, c)
            if i < half:
                skips.append(x)
        return x

    def finish(self, x: Tensor, c: Tensor) -> Tensor:
        """The tokens after the last block -> the velocity (N,C,H,W)."""
        return self.unpatchify(self.final_layer(x, c))


class SkipCache:
    """One trajectory of a `SkipDiT` under Skip-Cache; called like the model.

    A refresh step runs everything and keeps one tensor: x entering block L-s, before that block's merge. A reuse step
    runs blocks 0..s-1, whose outputs are the fresh skips, sets x to the kept tensor, and runs blocks L-s..L-1.

    kept: s, from 1 to L/2 - 1.
    interval: one refresh step in that many.
    window: only steps with ``low < t < high`` take part, the first of them refreshes; all others run everything.
    """

    def __init__(
        self, model: SkipDiT, kept: int, interval: int, window: tuple[float, float] = (-math.inf, math.inf)
    ) -> None:
        if not 0 < kept < len(model.blocks) // 2:
            raise ValueError(f"kept={kept}: with {len(model.blocks)} blocks, 1 to {len(model.blocks) // 2 - 1} can be")
        self.model, self.kept, self.interval, self.window = model, kept, interval, window
        self.cache: Tensor | None = None
        self.age = 0  # steps since the refresh, that one included

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        model, depth = self.model, len(self.model.blocks)
        inside = self.window[0] < t[0].item() < self.window[1]
        x, c = model.embed(x, t, y)
        skips: list[Tensor] = []
        x = model.run(x, c, skips, 0, self.kept)
        if inside and self.cache is not None and self.age < self.interval:
            x, self.age = self.cache, self.age + 1
        else:
            x = model.run(x, c, skips, self.kept, depth - self.kept)
            self.cache, self.age = (x, 1) if inside else (None, 0)
        return model.finish(model.run(x, c, skips, depth - self.kept, depth), c)


def skip_cache_sample(
    model: SkipDiT,
    kept: int,
    interval: int,
    window: tuple[float, float] = (-math.inf, math.inf),
    **sampling: Any,
) -> Tensor:
    """`digits.sample` (seed, n, steps, ...; "batched" layout only, there is one cache) under `SkipCache`."""
    return digits.sample(SkipCache(model, kept, interval, window), layout="batched", **sampling)


def build_digits(skips: bool) -> SkipDiT:
    """The untrained network for the digits: 8 blocks, width 96, 3 heads; 1.16 M parameters (1.08 M without skips)."""
    return SkipDiT(depth=8, mlp_ratio=2, input_size=digits.SIZE, in_channels=1, num_classes=digits.CLASSES, skips=skips)


def load_digits(skips: bool, path: str | Path | None = None) -> SkipDiT:
    """The trained network, eval mode, float32, CPU; ``path`` defaults to the committed checkpoint."""
    return digits.load_weights(build_digits(skips), path or (SKIP_FILE if skips else PLAIN_FILE))
