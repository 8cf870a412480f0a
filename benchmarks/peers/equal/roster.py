"""Who is compared, in the order of measuring."""

from __future__ import annotations

from benchmarks.peers.equal import caches, ours, samplers
from benchmarks.peers.equal.lab import Contender
from benchmarks.tasks import DIGITS, Task

OF_DIGITS = ("moeca calibrated, one span",)  # their schedules are of the digits


def contenders(task: Task = DIGITS) -> list[Contender]:
    """All of a task."""
    every = [*samplers.contenders(), *ours.contenders(), *caches.contenders()]
    return [one for one in every if task is DIGITS or one.name not in OF_DIGITS]
