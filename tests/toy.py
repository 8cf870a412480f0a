"""A model, and a sampler for it, that tests name on the command line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models import DiT


def model() -> DiT:
    torch.manual_seed(0)
    return DiT(depth=2, dim=16, heads=2, num_experts=4, top_k=2, hidden=12, size=4, channels=2)


def sample(model: Any, seed: int) -> Tensor:
    """Eight Euler steps; 3 samples [3, 2, 4, 4]."""
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([1, 2, 3])
    for step in range(8):
        x = x - model(x, torch.full((3,), 1000.0 * (1 - step / 8)), labels) / 8
    return x
