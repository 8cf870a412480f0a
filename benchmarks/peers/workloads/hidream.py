"""HiDream's structure: diffusers' transformer, small and random, at the text features of examples/02.

The Euler loop is this benchmark's own, as for the other workloads; the model code is diffusers'.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.workload import SEED, Batch, Workload, latents

CHANNELS, EDGE = 4, 32
HEADS, HEAD = 4, 32


@dataclass(frozen=True)
class HiDream(Workload):
    """Latents (n,4,32,32). layers: double blocks, and as many single ones."""

    layers: int = 3  # a step of 2 x 280 tokens takes about 0.1 s on one thread

    result = "peers_hidream"
    modules = (r"(double|single)_stream_blocks\.\d+\.block\.(attn1|ff_i|ff_t)",)
    stacks = {"double_stream_blocks": "Pattern_0", "single_stream_blocks": "Pattern_3"}  # noqa: RUF012 - one for the class
    functor = "HiDreamPatchFunctor"
    guidance = 5.0
    fixed_batch = True  # its forward loops over the samples

    @property
    def model(self) -> str:
        return (
            f"HiDreamImageTransformer2DModel of diffusers, random weights: {self.layers} double and {self.layers} "
            f"single blocks, width {HEADS * HEAD}, 2 of 4 experts and a shared one, 256 image and 24 text tokens"
        )

    def shipped(self) -> nn.Module:
        model: nn.Module = _example().tiny_transformer(EDGE, layers=self.layers, heads=HEADS, head=HEAD)
        return model

    def batches(self, seed: int = SEED) -> list[Batch]:
        noise = latents(self.size, seed, CHANNELS, EDGE, EDGE)
        return [Batch(one, torch.arange(self.size.digits)) for one in noise]

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        """Features of the prompts and of as many empty ones: T5 (2n,8,32), Llama (4,2n,8,24), pooled (2n,16)."""
        prompts = [_example().prompt(int(label)) for label in batch.labels]

        def both(name: str, axis: int) -> Tensor:
            return torch.cat([one[sign + name] for sign in ("", "negative_") for one in prompts], dim=axis)

        return both("prompt_embeds_t5", 0), both("prompt_embeds_llama3", 1), both("pooled_prompt_embeds", 0)

    def read(self, output: Any) -> Tensor:
        """HiDream's pipeline takes the negative of what its transformer gives; a bundle gives the tensor itself."""
        velocity: Tensor = output if isinstance(output, Tensor) else output[0]
        return -velocity


def _example() -> Any:
    return importlib.import_module("examples.02_diffusers_hidream")
