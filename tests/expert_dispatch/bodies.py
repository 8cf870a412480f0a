"""Expert bodies: with weights in slices, and none that is a (gated) MLP. All map [n, WIDTH] to [n, WIDTH]."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.expert_dispatch.layers import EXPERTS, HIDDEN, WIDTH, OneHot

Act = Callable[[Tensor], Tensor]


class Sliced(nn.Module):
    """`pretraining_tp`: the first weights in row slices, concatenated, the last in column slices, summed."""

    def __init__(self, act: Act, gated: bool, bias: bool, slices: int = 2) -> None:
        super().__init__()
        self.act, self.slices = act, slices
        self.gate = nn.Linear(WIDTH, HIDDEN, bias) if gated else None
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias), nn.Linear(HIDDEN, WIDTH, bias)

    def wide(self, layer: nn.Linear, x: Tensor) -> Tensor:
        size = HIDDEN // self.slices
        biases = (None,) * self.slices if layer.bias is None else layer.bias.split(size)
        parts = [F.linear(x, w, b) for w, b in zip(layer.weight.split(size, dim=0), biases, strict=True)]
        return torch.cat(parts, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.wide(self.up, x)
        h = self.act(h) if self.gate is None else self.act(self.wide(self.gate, x)) * h
        size = HIDDEN // self.slices
        pairs = zip(h.split(size, dim=-1), self.down.weight.split(size, dim=1), strict=True)
        out = sum((F.linear(part, w) for part, w in pairs), torch.zeros((), dtype=x.dtype))
        return out if self.down.bias is None else out + self.down.bias


class Normed(nn.Module):
    """A norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.gelu(self.up(x))))


class Scaled(nn.Module):
    """A learned scale, and the input added."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.silu(self.up(x)))


class Deep(nn.Sequential):
    """Three layers."""

    def __init__(self) -> None:
        sizes = (WIDTH, HIDDEN, HIDDEN, WIDTH)
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
        super().__init__(*layers[:-1])


class Mixing(nn.Module):
    """What one token gets depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(0))


class Counted(Normed):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Buffered(nn.Module):
    """A table that isn't a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0.5, 1.5, HIDDEN))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) * self.table)


class With(OneHot):
    """A layer with experts that `make` builds, given their number."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(make(e) for e in range(EXPERTS))
