"""The workloads that are measured, by the names that the command line takes."""

from __future__ import annotations

from benchmarks.peers.workload import Size, Workload
from benchmarks.peers.workloads.hidream import HiDream
from benchmarks.peers.workloads.s2 import S2
from benchmarks.peers.workloads.trained_digits import QUICK, WHOLE, TrainedDigits

WORKLOADS: dict[str, type[Workload]] = {"digits": TrainedDigits, "s2": S2, "hidream": HiDream}

_FEW = Size(digits=1, rounds=1, steps=8)


def workload(name: str, quick: bool) -> Workload:
    """The workload in its whole size, or one that only shows that everything runs."""
    if name == "digits":
        return TrainedDigits(QUICK if quick else WHOLE)
    if name == "s2":  # a step takes a second
        return S2(_FEW, depth=2) if quick else S2(Size(digits=1, rounds=2, steps=16))
    return HiDream(_FEW, layers=2) if quick else HiDream(Size(digits=1, rounds=2, steps=50))
