"""A small curved flow and samplers of it: what the fits of the weights of the output are tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STEPS = 12


class Velocity(nn.Module):
    """A curved flow with a label; no transformer, and its graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        hidden = torch.sin(3 * self.a(x) + 4 * t.reshape(-1, 1, 1, 1)) * (1 + 0.2 * y.reshape(-1, 1, 1, 1))
        return self.b(hidden) + 0.5 * x


def guided(model: Any, seed: int, steps: int = STEPS, scale: float = 2.0) -> Tensor:
    """Euler, with both halves of the guidance in one batch."""
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        t = torch.full((8,), 1.0 - step / steps)
        c, u = model(torch.cat([x, x]), t, torch.tensor([1.0] * 4 + [0.0] * 4)).chunk(2)
        x = x - (u + scale * (c - u)) / steps
    return x


def two_calls(model: Any, seed: int, steps: int = STEPS) -> Tensor:
    """Euler, with each part of the guidance in a call of its own."""
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        t = torch.full((8,), 1.0 - step / steps)
        c, u = model(x, t, torch.ones(8)), model(x, t, torch.zeros(8))
        x = x - (u + 2 * (c - u)) / steps
    return x


def second_order(model: Any, seed: int, steps: int = STEPS) -> Tensor:
    """Adams-Bashforth steps: each takes the output of the step before, too."""
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    before = None
    for step in range(steps):
        v = model(x, torch.full((8,), 1.0 - step / steps), torch.ones(8))
        x = x - (v if before is None else 1.5 * v - 0.5 * before) / steps
        before = v
    return x
