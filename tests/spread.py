"""Models that are spread over several ranks by DTensors, and what ends a rank that waits for another one."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A gated MLP with a residual, as a block that tensor parallelism cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + condition * self.down(nn.functional.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.blocks, self.out = nn.Linear(1, 16), nn.ModuleList(Block() for _ in range(2)), nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        condition = self.time(t.view(-1, 1) / 1000)[:, None]
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x)


def cut(network: nn.Module, mesh: Any) -> nn.Module:
    """The network with its MLPs cut over the ranks."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in network.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return network


def sharded(network: nn.Module, mesh: Any) -> nn.Module:
    """The network under FSDP2."""
    from torch.distributed.fsdp import fully_shard

    for block in network.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


class Untraced(Blocks):
    """Without Dynamo: a thousand handles of it are made in seconds."""

    @torch._dynamo.disable
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t)


class Watch:
    """Ends the process if a step takes too long, and tells which."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.where = seconds, ""
        self.timer = threading.Timer(0, lambda: None)

    def at(self, where: str) -> None:
        self.timer.cancel()
        self.where = where
        self.timer = threading.Timer(self.seconds, self.tell)
        self.timer.daemon = True
        self.timer.start()

    def tell(self) -> None:
        sys.stdout.write(json.dumps({"hang": self.where}) + "\n")
        sys.stdout.flush()
        os._exit(7)
