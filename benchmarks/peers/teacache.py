"""A TeaCache-like step cache: the change that all blocks make is reused while the first block's input drifts little.

Written from the description (Liu et al., arXiv 2411.19108): the relative L1 change of the timestep-modulated input, put
through a polynomial that was fitted to the change of the blocks' output, adds up from step to step; below a threshold
the last residual is added to the tokens instead of running the blocks. The first and the last step are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import macs
from benchmarks.peers.way import Family, bytes_in
from benchmarks.peers.workload import CALIBRATION_SEED, Batch, Workload
from examples.dit_moe import DiTMoE, modulate

THRESHOLDS = (0.03, 0.05, 0.08, 0.1, 0.15, 0.25)
DEGREE = 4  # of the published polynomials


class Parts:
    """The model's forward in three, each one a graph: into the blocks, through them, out of them."""

    def __init__(self, model: DiTMoE, compiled: bool = True) -> None:
        self.model = model
        self.enter, self.blocks, self.leave = (
            torch.compile(part, fullgraph=True) if compiled else part
            for part in (self._enter, self._blocks, self._leave)
        )

    def _enter(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (N,T,D), conditioning (N,D), and what enters the first block's attention (N,T,D)."""
        model, block = self.model, self.model.blocks[0]
        tokens = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y)
        shift, scale, *_ = block.adaLN_modulation(c).chunk(6, dim=1)
        return tokens, c, modulate(block.norm1(tokens), shift, scale)

    def _blocks(self, tokens: Tensor, c: Tensor) -> Tensor:
        """The residual: what all blocks add to the tokens."""
        x = tokens
        for block in self.model.blocks:
            x = block(x, c)
        return x - tokens

    def _leave(self, tokens: Tensor, residual: Tensor, c: Tensor) -> Tensor:
        return self.model.unpatchify(self.model.final_layer(tokens + residual, c))


def change(now: Tensor, before: Tensor) -> float:
    """Relative L1, read on the host."""
    return ((now - before).abs().mean() / before.abs().mean()).item()


class TeaCache:
    """One trajectory; called like the model."""

    def __init__(self, parts: Parts, steps: int, threshold: float, polynomial: np.poly1d) -> None:
        self.parts, self.steps, self.threshold, self.polynomial = parts, steps, threshold, polynomial
        self.taken = self.computed = 0
        self.drift = 0.0
        self.signal: Tensor | None = None
        self.residual: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c, signal = self.parts.enter(x, t, y)
        if self.signal is not None:
            self.drift += float(self.polynomial(change(signal, self.signal)))
        self.signal = signal
        if self.residual is None or self.drift >= self.threshold or self.taken == self.steps - 1:
            self.residual, self.drift = self.parts.blocks(tokens, c), 0.0
            self.computed += 1
        self.taken += 1
        return self.parts.leave(tokens, self.residual, c)


@cache
def fitted(work: Workload) -> np.poly1d:
    """The polynomial from the input's change to the output's, fitted on uncached trajectories of other seeds."""
    parts = Parts(work.prepared(), compiled=False)
    pairs: list[tuple[float, float]] = []
    for batch in work.batches(CALIBRATION_SEED)[:2]:
        before: list[Tensor] = []

        def model(x: Tensor, t: Tensor, y: Tensor, before: list[Tensor] = before) -> Tensor:
            tokens, c, signal = parts.enter(x, t, y)
            residual = parts.blocks(tokens, c)
            if before:
                pairs.append((change(signal, before[0]), change(tokens + residual, before[1])))
            before[:] = [signal, tokens + residual]
            return parts.leave(tokens, residual, c)

        work.draw(model, batch)
    seen, wanted = np.array(pairs).T
    return np.poly1d(np.polyfit(seen, wanted, min(DEGREE, len(pairs) - 1)))


class Setting:
    """`TeaCache` at one threshold."""

    def __init__(self, parts: Parts, work: Workload, threshold: float) -> None:
        self.parts, self.work, self.threshold = parts, work, threshold
        self.last: TeaCache | None = None

    def sample(self, batch: Batch) -> Tensor:
        self.last = TeaCache(self.parts, self.work.size.steps, self.threshold, fitted(self.work))
        return self.work.draw(self.last, batch)

    def macs(self) -> float:
        assert self.last is not None, "nothing was sampled"
        computed = self.last.computed / self.work.size.steps
        entering = macs.shares(self.work)["blocks.0.adaLN_modulation"]  # once more than the model itself
        return computed + (1 - computed) * (1 - macs.of_blocks(self.work, "blocks")) + entering

    def state_bytes(self) -> int:
        assert self.last is not None, "nothing was sampled"
        return bytes_in([self.last.signal, self.last.residual])

    def forget(self) -> None:
        self.last = None


def family(thresholds: tuple[float, ...] = THRESHOLDS) -> Family:
    def opened(work: Workload) -> Mapping[str, Setting]:
        fitted(work)
        parts = Parts(work.prepared())
        return {f"{one:g}": Setting(parts, work, one) for one in thresholds}

    note = (
        "thresholds by model, 0.17 to 0.45 for HiDream-I1, and a polynomial of degree 4 fitted for each model, here "
        "on other seeds. Written anew as three whole graphs with the decision between them"
    )
    return Family("TeaCache-like", "peer", note, opened, cold=True)
