"""The uncached digits, and how far a contender's are from them."""

from __future__ import annotations

from typing import Protocol

import pytest
import torch
from torch import Tensor

from benchmarks.peers.way import Plain
from benchmarks.peers.workload import Batch
from benchmarks.peers.workloads.trained_digits import QUICK, TrainedDigits
from examples import digits

WORK = TrainedDigits(QUICK)
BATCH = WORK.batches()[0]


@pytest.fixture(scope="session")
def uncached() -> Tensor:
    with torch.no_grad():
        return Plain(WORK.prepared(), WORK).sample(BATCH)


class Contender(Protocol):
    """Samples a batch."""

    def sample(self, batch: Batch) -> Tensor:
        """[N, 1, H, W]"""


def psnr(way: Contender, uncached: Tensor) -> float:
    """Mean PSNR in dB to the uncached digits, each at most 200."""
    return digits.psnr(way.sample(BATCH), uncached).clamp(max=200).mean().item()
