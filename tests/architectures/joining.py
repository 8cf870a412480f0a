"""How a branch meets the trunk: norms, modulation, gates, and the many ways to write x + f(x)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.parts import DIM, Parts

Triple = tuple[Tensor | None, Tensor | None, Tensor | None]  # shift, scale, gate, each (N,1,D)
PER_BRANCH = {"zero": 3, "tanh": 3, "scale only": 1}


class HandRMS(nn.Module):
    """RMSNorm written out, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


def norm(form: str) -> nn.Module:
    match form:
        case "layer":
            return nn.LayerNorm(DIM)
        case "layer, no weights":
            return nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        case "rms":
            return nn.RMSNorm(DIM, eps=1e-6)
    return HandRMS()


class Modulation(nn.Module):
    """c (N,D) -> a triple for each of `count` branches: by a linear of the block's own, or by a table that is added to
    what one linear gives for all blocks (PixArt)."""

    def __init__(self, parts: Parts, count: int) -> None:
        super().__init__()
        self.gate, self.count = parts.gate, count
        self.width = count * PER_BRANCH.get(parts.gate, 0)
        shared = parts.modulation == "shared table"
        self.linear = nn.Linear(DIM, self.width * DIM) if self.width and not shared else None
        self.table = nn.Parameter(torch.randn(self.width, DIM) * 0.3) if self.width and shared else None

    def forward(self, c: Tensor, shared: Tensor | None) -> list[Triple]:
        if not self.width:
            return [(None, None, None)] * self.count
        if self.table is not None:
            assert shared is not None
            rows = self.table + shared.unflatten(-1, (-1, DIM))[:, : self.width]
            values = rows.chunk(self.width, dim=1)
        else:
            values = self.linear(F.silu(c)).unsqueeze(1).chunk(self.width, dim=-1)
        if self.gate == "scale only":
            return [(None, scale, None) for scale in values]
        return [(values[i], values[i + 1], values[i + 2]) for i in range(0, self.width, 3)]


class Join(nn.Module):
    """One residual branch: `enter` gives what it reads, `leave` adds what it gives to the trunk."""

    def __init__(self, parts: Parts, odd: str = "", dropout: bool = False) -> None:
        super().__init__()
        self.parts, self.how = parts, odd or parts.join
        self.norm = norm(parts.norm) if parts.norm_place in ("pre", "sandwich") else None
        self.post = norm(parts.norm) if parts.norm_place in ("post", "sandwich") else None
        self.layer_scale = nn.Parameter(torch.rand(DIM) + 0.2) if parts.gate == "layer scale" else None
        self.dropout = nn.Dropout(0.0 if parts.seed % 2 else 0.1) if dropout else nn.Identity()

    def enter(self, x: Tensor, triple: Triple) -> Tensor:
        shift, scale, _ = triple
        h = x.to(torch.bfloat16) if self.parts.join == "float32 stream" else x
        h = h if self.norm is None else self.norm(h)
        h = h if scale is None else h * (1 + scale)
        return h if shift is None else h + shift

    def gated(self, y: Tensor, triple: Triple) -> Tensor:
        gate = self.gate(triple)
        return y if gate is None else gate * y

    def gate(self, triple: Triple) -> Tensor | None:
        if self.layer_scale is not None:
            return self.layer_scale
        gate = triple[2]
        return gate.tanh() if gate is not None and self.parts.gate == "tanh" else gate

    def leave(self, x: Tensor, y: Tensor, triple: Triple) -> Tensor:
        y = self.dropout(y)
        y = self.post(y) if self.post is not None and self.parts.norm_place == "sandwich" else y
        return self.after(self.add(x, y, self.gate(triple)))

    def after(self, x: Tensor) -> Tensor:
        """Post-norm."""
        if self.post is None or self.parts.norm_place != "post":
            return x
        return self.post(x.to(torch.bfloat16)).float() if self.parts.join == "float32 stream" else self.post(x)

    def add(self, x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        if self.how == "addcmul":
            return torch.addcmul(x, y, x.new_ones(()) if gate is None else gate)
        y = y if gate is None else y * gate if self.how == "y + x" else gate * y
        match self.how:
            case "y + x":
                return y + x
            case "x += y":
                x += y
                return x
            case "torch.add":
                return torch.add(x, y)
            case "in float32":
                return (x.float() + y.float()).to(x.dtype)
            case "flat":
                return (x.flatten(0, 1) + y.flatten(0, 1)).view(x.shape)
            case "lerp":
                return torch.lerp(x, y, 0.5)
            case "alpha":
                return torch.add(x, y, alpha=0.5)
            case "minus":
                return x - y
        return x + y
