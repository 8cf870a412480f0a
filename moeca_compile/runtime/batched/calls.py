"""Which waiting steps share the next call. Nothing here knows what a call runs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

PATIENCE = 16  # a step that was passed over this often comes first, whatever it costs


class Waiting(NamedTuple):
    """What the choice needs to know of a waiting step.

    Attributes:
        key: steps with equal keys can share a call.
        cost: multiply-accumulates of one sample, or another measure.
        batch: number of samples.
        passed: how many calls were made while it waited.
    """

    key: Hashable
    cost: float
    batch: int
    passed: int


class Policy(Protocol):
    """Chooses among waiting steps."""

    def __call__(self, waiting: Sequence[Waiting], most: int) -> list[int]:
        """Numbers of the steps that share the next call, at most `most` samples.

        Args:
            waiting: not empty, the one that waits for longest first.
            most: at least the batch of each step.
        """


def cheap_first(waiting: Sequence[Waiting], most: int) -> list[int]:
    """The cheapest steps first. So requests run through their cheap steps until all of them wait at an expensive one,
    which they then share: expensive calls come with full batches, whenever the requests came."""
    leader = next((step for step in waiting if step.passed >= PATIENCE), None)
    leader = leader or min(waiting, key=lambda step: step.cost)
    return _same(waiting, leader.key, most)


def oldest_first(waiting: Sequence[Waiting], most: int) -> list[int]:
    """The step that waits for longest, and what can share its call. Steps keep the order in which they came."""
    return _same(waiting, waiting[0].key, most)


def _same(waiting: Sequence[Waiting], key: Hashable, most: int) -> list[int]:
    chosen, room = [], most
    for number, step in enumerate(waiting):
        if step.key == key and step.batch <= room:
            chosen.append(number)
            room -= step.batch
    return chosen
