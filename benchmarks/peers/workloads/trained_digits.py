"""Digits of the trained DiT-MoE: the workload whose quality can be told.

The digits are held out: no schedule was calibrated and no threshold fitted on their noise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.quality import quality
from benchmarks.peers.solvers import adams_bashforth
from benchmarks.peers.workload import SEED, Batch, Size, Truth, Workload, with_null
from examples import digits

WORK = Path("build/peers")
WHOLE = Size(digits=8, rounds=5, steps=50, converged=200)
QUICK = Size(digits=2, rounds=1, steps=8, converged=16)


@dataclass(frozen=True)
class TrainedDigits(Workload):
    """Images (n,1,16,16)."""

    result = "peers"
    modules = (r"blocks\.\d+\.attn", r"blocks\.\d+\.moe")
    stacks = {"blocks": "Pattern_3"}  # noqa: RUF012 - one for the class
    speed_only = False

    @property
    def model(self) -> str:
        return "digits DiT-MoE: 6 blocks, width 96, 2 of 8 experts and a shared one, 64 tokens; float32, guidance 2"

    def shipped(self) -> digits.DiTMoE:
        return digits.load_model().requires_grad_(False)

    def batches(self, seed: int = SEED) -> list[Batch]:
        """Every class as often as can be."""
        count = self.size.digits * self.size.rounds
        noise = digits.initial_noise(seed, count).split(self.size.digits)
        return [Batch(*pair) for pair in zip(noise, digits.labels_of(count).split(self.size.digits), strict=True)]

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        return (with_null(batch.labels, digits.CLASSES),)

    def truth(self) -> Truth:
        """With the converged digits; drawn now, or before by the same weights: kept in `WORK`."""
        key = hashlib.sha256(digits.MODEL_FILE.read_bytes() + repr(self.size).encode()).hexdigest()[:16]
        file = WORK / f"truth-{key}.pt"
        if not file.exists():
            found, exact = super().truth(), self.prepared()
            converged = [self.draw(exact, one, self.size.converged, adams_bashforth) for one in found.batches]
            WORK.mkdir(parents=True, exist_ok=True)
            torch.save((found.uncached, torch.cat(converged)), file)
        return Truth(self.batches(), *torch.load(file))

    def figures(self, images: Tensor, truth: Truth) -> dict[str, Any]:
        assert truth.converged is not None, "the exact solution isn't known"
        return quality(images, truth.labels, truth.uncached, truth.converged)
