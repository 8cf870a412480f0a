"""A model's forward in three: into the blocks, through them, out of them: what a cache of whole steps needs.

Each third is one graph. The first also gives what enters the first block's attention, which tells how far a step is
from the one before.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.peers.workload import Workload
from examples.dit_moe import DiTMoE, modulate


class DiTThirds:
    """Of examples/dit_moe.py. again: what the first third computes although the blocks do."""

    again: ClassVar[str] = "blocks.0.adaLN_modulation"

    def __init__(self, model: DiTMoE) -> None:
        self.model = model

    def enter(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Tokens (N,T,D), what enters the first attention (N,T,D), and what else the blocks take."""
        model, block = self.model, self.model.blocks[0]
        tokens = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y)
        shift, scale, *_ = block.adaLN_modulation(c).chunk(6, dim=1)
        return tokens, modulate(block.norm1(tokens), shift, scale), (c,)

    def blocks(self, tokens: Tensor, c: Tensor) -> Tensor:
        """The residual: what all blocks add to the tokens."""
        x = tokens
        for block in self.model.blocks:
            x = block(x, c)
        return x - tokens

    def leave(self, tokens: Tensor, residual: Tensor, c: Tensor) -> Tensor:
        return self.model.unpatchify(self.model.final_layer(tokens + residual, c))


class HiDreamThirds:
    """Of diffusers' HiDreamImageTransformer2DModel, for square latents; the residual is that of the image tokens."""

    again: ClassVar[str] = "double_stream_blocks.0.block.adaLN_modulation"

    def __init__(self, model: Any) -> None:
        self.model = model

    def enter(
        self, x: Tensor, t: Tensor, t5: Tensor, llama: Tensor, pooled: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The same; `llama` (layers,N,T,C) has the text features of a layer for each block."""
        model = self.model
        patches, _, _, places = model.patchify(x)
        tokens = model.x_embedder(patches)
        c = model.t_embedder(t, x.dtype) + model.p_embedder(pooled)
        *projections, last = model.caption_projection
        texts = [project(llama[i]) for project, i in zip(projections, model.config.llama_layers, strict=True)]
        text = last(t5)
        length = text.shape[1] + texts[-1].shape[1] + texts[0].shape[1]
        rotary = model.pe_embedder(torch.cat([places, places.new_zeros(len(x), length, 3)], dim=1))
        block = model.double_stream_blocks[0].block
        shift, scale, *_ = block.adaLN_modulation(c)[:, None].chunk(12, dim=-1)
        return tokens, block.norm1_i(tokens) * (1 + scale) + shift, (c, rotary, text, *texts)

    def blocks(self, tokens: Tensor, c: Tensor, rotary: Tensor, text: Tensor, *texts: Tensor) -> Tensor:
        model, x = self.model, tokens
        text = torch.cat([text, texts[-1]], dim=1)
        length, of_block = text.shape[1], iter(texts)
        for block in model.double_stream_blocks:
            both = torch.cat([text, next(of_block)], dim=1)
            x, text = block(x, encoder_hidden_states=both, temb=c, image_rotary_emb=rotary)
            text = text[:, :length]
        joint = torch.cat([x, text], dim=1)
        length = joint.shape[1]
        for block in model.single_stream_blocks:
            longer = torch.cat([joint, next(of_block)], dim=1)
            joint = block(longer, temb=c, image_rotary_emb=rotary)[:, :length]
        return joint[:, : tokens.shape[1]] - tokens

    def leave(self, tokens: Tensor, residual: Tensor, c: Tensor, *others: Tensor) -> tuple[Tensor]:
        patches = self.model.final_layer(tokens + residual, c)
        size, (batch, count, _) = self.model.config.patch_size, patches.shape
        edge = round(count**0.5)
        grid = patches.reshape(batch, edge, edge, size, size, -1).permute(0, 5, 1, 3, 2, 4)
        return (grid.reshape(batch, -1, edge * size, edge * size),)


class Thirds:
    """Those of a workload's model, prepared; each third compiled by itself."""

    def __init__(self, work: Workload, compiled: bool = True) -> None:
        self.model: nn.Module = work.prepared()
        found = (DiTThirds if isinstance(self.model, DiTMoE) else HiDreamThirds)(self.model)
        self.again = found.again
        self.enter, self.blocks, self.leave = (
            torch.compile(third, fullgraph=True) if compiled else third
            for third in (found.enter, found.blocks, found.leave)
        )
