"""The cache of one stream: tensors by slot, and when each region was last computed. No torch: tensors are opaque."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moeca_compile.schedule import Action, Row

Distances = tuple[tuple[float, float, float, float], ...]


@dataclass(slots=True)
class StreamState:
    """`tensors` by slot (None: never written); `history` by region: its last two computed steps, latest first."""

    slots: int
    regions: int
    tensors: list[Any] = field(init=False)
    history: list[tuple[int, ...]] = field(init=False)
    last_step: int = -1

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything: the next call is cold."""
        self.tensors = [None] * self.slots
        self.history = [()] * self.regions
        self.last_step = -1

    def can_run(self, row: Row, step: int) -> bool:
        """Whether every region that `row` doesn't compute has a value, written without a gap in this stream."""
        if self.last_step != step - 1:
            return False
        return all(action is Action.COMPUTE or seen for action, seen in zip(row, self.history, strict=True))

    def distances(self, step: int) -> Distances:
        """Per region: s-s0, (s-s0)(s-s1), 1/(s-s0), 1/(s-s1), with 0 where history is missing (a lower order then)."""
        rows = []
        for seen in self.history:
            ahead = float(step - seen[0]) if seen else 0.0
            further = float(step - seen[1]) if len(seen) > 1 else 0.0
            rows.append((ahead, ahead * further, 1.0 / ahead if ahead else 0.0, 1.0 / further if further else 0.0))
        return tuple(rows)

    def commit(self, step: int, row: Row, writes: Sequence[int], values: Sequence[Any]) -> None:
        """Take what a variant wrote at `step`."""
        for slot, value in zip(writes, values, strict=True):
            self.tensors[slot] = value
        for region, action in enumerate(row):
            if action is Action.COMPUTE:
                self.history[region] = (step, *self.history[region][:1])
        self.last_step = step
