"""Dense feed-forward layers: (N,T,D) -> (N,T,D)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.parts import DIM

HIDDEN = 24


class Mlp(nn.Module):
    def __init__(self, form: str = "gelu", hidden: int = HIDDEN) -> None:
        super().__init__()
        self.form = form
        self.up = nn.Linear(DIM, 2 * hidden if form == "geglu packed" else hidden, bias=form != "swiglu")
        self.gate = nn.Linear(DIM, hidden, bias=False) if form == "swiglu" else None
        self.conv = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden) if form.startswith("conv") else None
        self.down = nn.Linear(hidden, DIM, bias=form != "swiglu")

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gate is not None:
            h = F.silu(self.gate(x)) * h
        elif self.form == "geglu packed":
            value, gate = h.chunk(2, dim=-1)
            h = value * F.gelu(gate)
        elif self.form == "relu squared":
            h = F.relu(h).square()
        elif self.conv is not None:
            mixed = self.conv(h.transpose(1, 2)).transpose(1, 2)
            h = F.silu(h + mixed if "residual" in self.form else mixed)
        else:
            h = F.gelu(h, approximate="tanh" if "tanh" in self.form else "none")
        return self.down(h)
