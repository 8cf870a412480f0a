"""A TeaCache-like step cache: the change that all blocks make is reused while the first block's input drifts little.

Written from the description (Liu et al., arXiv 2411.19108): the relative L1 change of the timestep-modulated input, put
through a polynomial that was fitted to the change of the blocks' output, adds up from step to step; below a threshold
the last residual is added to the tokens instead of running the blocks. The first and the last step are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.peers import macs
from benchmarks.peers.thirds import Thirds
from benchmarks.peers.way import Family, bytes_in
from benchmarks.peers.workload import CALIBRATION_SEED, Batch, Workload

THRESHOLDS = (0.03, 0.05, 0.08, 0.1, 0.15, 0.25)
DEGREE = 4  # of the published polynomials


def change(now: Tensor, before: Tensor) -> float:
    """Relative L1, read on the host."""
    return ((now - before).abs().mean() / before.abs().mean()).item()


class TeaCache:
    """One trajectory; called like the model."""

    def __init__(self, thirds: Thirds, steps: int, threshold: float, polynomial: np.poly1d) -> None:
        self.thirds, self.steps, self.threshold, self.polynomial = thirds, steps, threshold, polynomial
        self.taken = self.computed = 0
        self.drift = 0.0
        self.signal: Tensor | None = None
        self.residual: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        tokens, signal, others = self.thirds.enter(*inputs)
        if self.signal is not None:
            self.drift += float(self.polynomial(change(signal, self.signal)))
        self.signal = signal
        if self.residual is None or self.drift >= self.threshold or self.taken == self.steps - 1:
            self.residual, self.drift = self.thirds.blocks(tokens, *others), 0.0
            self.computed += 1
        self.taken += 1
        return self.thirds.leave(tokens, self.residual, *others)


@cache
def changes(work: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Of the input and of the output from step to step, on uncached trajectories of other seeds."""
    thirds = Thirds(work, compiled=False)
    pairs: list[tuple[float, float]] = []
    for batch in work.batches(CALIBRATION_SEED)[:2]:
        before: list[Tensor] = []

        def model(*inputs: Tensor, before: list[Tensor] = before) -> Any:
            tokens, signal, others = thirds.enter(*inputs)
            residual = thirds.blocks(tokens, *others)
            if before:
                pairs.append((change(signal, before[0]), change(tokens + residual, before[1])))
            before[:] = [signal, tokens + residual]
            return thirds.leave(tokens, residual, *others)

        work.draw(model, batch)
    seen, wanted = np.array(pairs).T
    return seen, wanted


@cache
def fitted(work: Workload) -> np.poly1d:
    """The polynomial from the input's change to the output's."""
    seen, wanted = changes(work)
    return np.poly1d(np.polyfit(seen, wanted, min(DEGREE, len(seen) - 1)))


def threshold_for(work: Workload, interval: int) -> float:
    """What about every `interval`-th step passes."""
    seen, _ = changes(work)
    return (interval - 0.5) * float(np.mean(fitted(work)(seen)))


class Setting:
    """`TeaCache` at one threshold."""

    def __init__(self, thirds: Thirds, work: Workload, threshold: float) -> None:
        self.thirds, self.work, self.threshold = thirds, work, threshold
        self.last: TeaCache | None = None

    def sample(self, batch: Batch) -> Tensor:
        self.last = TeaCache(self.thirds, self.work.size.steps, self.threshold, fitted(self.work))
        return self.work.draw(self.last, batch)

    def computed(self) -> int:
        """Full steps of the last trajectory."""
        assert self.last is not None, "nothing was sampled"
        return self.last.computed

    def macs(self) -> float:
        assert self.last is not None, "nothing was sampled"
        computed = self.last.computed / self.work.size.steps
        entering = macs.shares(self.work)[self.thirds.again]  # once more than the model itself
        blocks = sum(macs.of_blocks(self.work, stack) for stack in self.work.stacks)
        return computed + (1 - computed) * (1 - blocks) + entering

    def state_bytes(self) -> int:
        assert self.last is not None, "nothing was sampled"
        return bytes_in([self.last.signal, self.last.residual])

    def forget(self) -> None:
        self.last = None


def family(thresholds: tuple[float, ...] = THRESHOLDS, intervals: tuple[int, ...] = ()) -> Family:
    """intervals: settings where about every N-th step is computed, for models whose quality can't be told."""

    def opened(work: Workload) -> Mapping[str, Setting]:
        fitted(work)
        thirds = Thirds(work)
        found = [*thresholds, *(threshold_for(work, one) for one in intervals)]
        return {f"{one:.3g}": Setting(thirds, work, one) for one in found}

    note = (
        "thresholds by model, 0.17 to 0.45 for HiDream-I1, and a polynomial of degree 4 fitted for each model, here "
        "on other seeds. Written anew as three whole graphs with the decision between them"
    )
    return Family("TeaCache-like", "peer", note, opened, cold=True)
