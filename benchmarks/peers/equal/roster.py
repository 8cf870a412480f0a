"""Who is compared, in the order of measuring."""

from __future__ import annotations

from benchmarks.peers.equal import caches, ours, samplers
from benchmarks.peers.equal.lab import Contender


def contenders() -> list[Contender]:
    """All of them."""
    return [*samplers.contenders(), *ours.contenders(), *caches.contenders()]
