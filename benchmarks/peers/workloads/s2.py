"""DiT-MoE-S/2-8E2A of benchmarks/models.py: 12 blocks, 256 tokens, random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.peers.workload import SEED, Batch, Workload, latents, with_null
from benchmarks.peers.workloads.trained_digits import TrainedDigits

CHANNELS, EDGE, CLASS, NULL = 4, 32, 207, 1000


@dataclass(frozen=True)
class S2(Workload):
    """Latents (n,4,32,32)."""

    depth: int = models.DEPTH

    result = "peers_s2"
    modules = TrainedDigits.modules
    stacks = TrainedDigits.stacks

    @property
    def model(self) -> str:
        return (
            f"DiT-MoE-{models.CONFIG}, random weights: {self.depth} blocks, width 384, 2 of 8 experts and two shared "
            "ones, 256 tokens"
        )

    def shipped(self) -> nn.Module:
        """All that are given share their 0.8 GB of weights."""
        one = _network(self.depth)
        return copy.deepcopy(one, {id(weight): weight for weight in one.parameters()})

    def batches(self, seed: int = SEED) -> list[Batch]:
        noise = latents(self.size, seed, CHANNELS, EDGE, EDGE)
        return [Batch(one, torch.full((self.size.digits,), CLASS)) for one in noise]

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        return (with_null(batch.labels, NULL),)

    def read(self, output: Any) -> Tensor:
        """The first half of the channels; the other is sigma."""
        velocity: Tensor = output[:, :CHANNELS]
        return velocity


@cache
def _network(depth: int) -> nn.Module:
    return models.network(depth)
