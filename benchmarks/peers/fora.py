"""An interval copy of modules, as FORA does it: attention and MoE run every N steps, between them their last outputs.

Written from the description (Selvaraju et al., arXiv 2407.01425). A flag and the kept outputs are attributes that
Dynamo guards, so both kinds of step are whole graphs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.peers import macs
from benchmarks.peers.solvers import euler
from benchmarks.peers.way import Family, bytes_in
from benchmarks.peers.workload import Batch, Size, guided, prepared


class Kept(nn.Module):
    """A module whose last output is returned again where it isn't `fresh`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.fresh = inner, True
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fresh or self.value is None:
            self.value = self.inner(x)
        return self.value


class Fora:
    """The model with its modules kept. Steps 0, N, 2N, ... are computed."""

    def __init__(self, compiled: bool = True) -> None:
        model = prepared()
        self.kept: list[Kept] = []
        for block in model.blocks:
            block.attn, block.moe = Kept(block.attn), Kept(block.moe)
            self.kept += [block.attn, block.moe]
        self.model = torch.compile(model, fullgraph=True) if compiled else model

    def set_fresh(self, fresh: bool) -> None:
        for one in self.kept:
            one.fresh = fresh


class Interval:
    """`Fora` at one interval."""

    def __init__(self, fora: Fora, size: Size, interval: int) -> None:
        self.fora, self.size, self.interval = fora, size, interval

    def sample(self, batch: Batch) -> Tensor:
        velocity = guided(self.fora.model, batch)
        taken = 0

        def step(x: Tensor, t: float) -> Tensor:
            nonlocal taken
            self.fora.set_fresh(taken % self.interval == 0)
            taken += 1
            return velocity(x, t)

        return euler(step, batch.noise, self.size.steps)

    def macs(self) -> float:
        computed = -(-self.size.steps // self.interval) / self.size.steps
        return computed + (1 - computed) * macs.without_modules()

    def state_bytes(self) -> int:
        return bytes_in([one.value for one in self.fora.kept])

    def forget(self) -> None:
        for one in self.fora.kept:
            one.value = None


def family(intervals: tuple[int, ...] = (2, 3, 4, 5, 6, 8)) -> Family:
    def opened(size: Size) -> Mapping[str, Interval]:
        fora = Fora()
        return {f"N={interval}": Interval(fora, size, interval) for interval in intervals}

    note = "one fixed interval; written anew here, each kind of step one graph"
    return Family("FORA-like copy", "peer", note, opened, cold=True)
