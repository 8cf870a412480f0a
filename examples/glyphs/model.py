"""The DiT-MoE of the glyphs: 64 tokens, 2 of 16 experts.

    model = load_model()
    images = sample(model, seed=0, n=62)           # (62,1,32,32): 0..9, A..Z, a..z, values about [-1, 1], ink at 1

The weights come from `examples/train_glyphs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from examples import digits
from examples.digits import CHECKPOINTS, Velocity
from examples.dit_moe import DiTMoE, dit_moe
from examples.glyphs.render import CHARACTERS, SIZE

CLASSES = len(CHARACTERS)
MODEL_FILE = CHECKPOINTS / "glyphs.safetensors"


def build_model() -> DiTMoE:
    """The untrained network: 6 blocks, width 96, 3 heads, 2 of 16 experts per token, one shared; 4.41 M parameters.

    Patches of 4, so 64 tokens: with 256 tokens a processor core needs a day to train it.
    """
    return dit_moe(
        "S/4-16E2A",
        depth=6,
        hidden_size=96,
        num_heads=3,
        expert_hidden=128,
        shared_hidden=128,
        input_size=SIZE,
        in_channels=1,
        num_classes=CLASSES,
        learn_sigma=False,
        pretraining_tp=1,
        aux_loss_weight=0.002,
    )


def load_model(path: str | Path | None = None) -> DiTMoE:
    """The trained network, eval mode, float32, CPU; ``path`` defaults to the checkpoint beside the digits'."""
    return digits.load_weights(build_model(), path or MODEL_FILE)


def labels_of(n: int) -> Tensor:
    """The labels `sample` draws: all 62 characters in turn; (n,) int64."""
    return torch.arange(n) % CLASSES


def initial_noise(seed: int, n: int) -> Tensor:
    """(n,1,32,32) standard normal, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(
    model: Velocity,
    seed: int,
    n: int = 62,
    steps: int = 50,
    cfg: float = 2.0,
    layout: Literal["batched", "two_calls"] = "batched",
    callback: Callable[[int, Tensor], None] | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Make n glyphs (n,1,32,32); everything else is as `digits.sample` has it."""
    labels = labels_of(n).to(device)
    null = torch.full_like(labels, CLASSES)
    return digits.integrate(model, initial_noise(seed, n).to(device), labels, null, steps, cfg, layout, callback)
