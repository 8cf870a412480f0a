"""An interval copy of modules, as FORA does it: attention and MoE run every N steps, between them their last outputs.

Written from the description (Selvaraju et al., arXiv 2407.01425). A flag and the kept outputs are attributes that
Dynamo guards, so both kinds of step are whole graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import macs
from benchmarks.peers.way import Family, bytes_in
from benchmarks.peers.workload import Batch, Workload


class Kept(nn.Module):
    """A module whose last output is returned again where it isn't `fresh`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.fresh = inner, True
        self.value: Any = None

    def forward(self, *args: Any, **keywords: Any) -> Any:
        if self.fresh or self.value is None:
            self.value = self.inner(*args, **keywords)
        return self.value


class Fora:
    """The model with its modules kept. Steps 0, N, 2N, ... are computed."""

    def __init__(self, work: Workload, compiled: bool = True) -> None:
        model = work.prepared()
        self.kept = [Kept(model.get_submodule(name)) for name in work.names(model)]
        for name, kept in zip(work.names(model), self.kept, strict=True):
            model.set_submodule(name, kept)
        self.model = torch.compile(model, fullgraph=True) if compiled else model

    def set_fresh(self, fresh: bool) -> None:
        for one in self.kept:
            one.fresh = fresh


class Interval:
    """`Fora` at one interval."""

    def __init__(self, fora: Fora, work: Workload, interval: int) -> None:
        self.fora, self.work, self.interval = fora, work, interval

    def sample(self, batch: Batch) -> Tensor:
        taken = 0

        def model(*inputs: Tensor) -> Any:
            nonlocal taken
            self.fora.set_fresh(taken % self.interval == 0)
            taken += 1
            return self.fora.model(*inputs)

        return self.work.draw(model, batch)

    def macs(self) -> float:
        steps = self.work.size.steps
        computed = -(-steps // self.interval) / steps
        return computed + (1 - computed) * macs.without_modules(self.work)

    def state_bytes(self) -> int:
        return bytes_in([one.value for one in self.fora.kept])

    def forget(self) -> None:
        for one in self.fora.kept:
            one.value = None


def family(intervals: tuple[int, ...] = (2, 3, 4, 5, 6, 8)) -> Family:
    def opened(work: Workload) -> Mapping[str, Interval]:
        fora = Fora(work)
        return {f"N={interval}": Interval(fora, work, interval) for interval in intervals}

    note = "one fixed interval; written anew here, each kind of step one graph"
    return Family("FORA-like copy", "peer", note, opened, cold=True)
