"""From a seed to a random DiT-like model, its inputs at any step, and what must be found in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.architectures.expected import Expected
from tests.architectures.model import Model
from tests.architectures.parts import CHANNELS, GRID, PROMPT, PROMPT_DIM, TOKENS, Parts, draw

Inputs = Callable[[int], dict[str, Tensor | None]]
BATCH = 2


def generate(seed: int) -> tuple[Model, Inputs, Expected]:
    """The model of a seed (eval, no gradients), its arguments by name at a step, and the answer."""
    return build(draw(seed))


def build(parts: Parts) -> tuple[Model, Inputs, Expected]:
    torch.manual_seed(parts.seed)
    model = Model(parts).to(getattr(torch, parts.dtype)).eval().requires_grad_(False)
    return model, partial(_inputs, parts), model.expect()


def _inputs(parts: Parts, step: int) -> dict[str, Tensor | None]:
    """Neighbouring steps are alike, as in sampling."""
    generator = torch.Generator().manual_seed(parts.seed)
    dtype = getattr(torch, parts.dtype)
    shape = (BATCH, TOKENS, 4 * CHANNELS) if parts.tokens_in else (BATCH, CHANNELS, 2 * GRID, 2 * GRID)
    x, drift = (torch.randn(shape, generator=generator) for _ in range(2))
    prompt = torch.randn(BATCH, PROMPT, PROMPT_DIM, generator=generator).to(dtype)
    prompted = parts.cross or parts.layout.startswith("two") or parts.condition == "pooled prompt"
    return {
        "x": (x + 0.1 * step * drift).to(dtype),
        "t": torch.full((BATCH,), 9.0 - 0.5 * step),
        "y": torch.tensor([1, 7]) if parts.condition == "label" else None,
        "prompt": prompt if prompted else None,
        "guidance": torch.full((BATCH,), 3.5) if parts.guidance else None,
    }
