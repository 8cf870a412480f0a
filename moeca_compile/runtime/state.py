"""The cache of one stream: outputs by slot, and when each region computed them. No torch: tensors are opaque."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moeca_compile.graph.variant import SLOTS, StateSlot
from moeca_compile.runtime.pace import Pace
from moeca_compile.schedule import Action, Row
from moeca_compile.schedule.timeline import TimelinePosition


class Answer(Protocol):
    """A yes or no that may still be on its way from a device."""

    def ready(self) -> bool:
        """Whether `holds` answers without waiting."""

    def holds(self) -> bool:
        """The answer."""


@dataclass(slots=True)
class StreamState:
    """State of one stream of a trajectory.

    Attributes:
        layout: the slots; y0, y1, y2 of one region output stand together, in this order.
        regions: how many columns the schedule has.
        tensors: by slot; None: never written.
        history: by region, the steps whose outputs are kept, latest first.
        last_step: the last step that was kept; -1: none.
        depths: by region, how many of its outputs the layout keeps.
        pace: what an adaptive schedule knows of the stream.
        place: where the stream is in a schedule with timesteps; None: nowhere yet.
        coming: `place` once the step that runs now is kept.
        finite: whether the output of the step that wrote here last is finite.
        finite_step: that step.
    """

    layout: tuple[StateSlot, ...]
    regions: int
    tensors: list[Any] = field(init=False)
    history: list[tuple[int, ...]] = field(init=False)
    last_step: int = -1
    depths: list[int] = field(init=False)
    pace: Pace = field(default_factory=Pace)
    place: TimelinePosition | None = None
    coming: TimelinePosition | None = None
    finite: bool | Answer = True
    finite_step: int = -1

    def __post_init__(self) -> None:
        self.depths = [0] * self.regions
        for slot in self.layout:
            if slot.slot in SLOTS:
                self.depths[slot.region] = max(self.depths[slot.region], SLOTS.index(slot.slot) + 1)
        self.clear()

    def clear(self) -> None:
        """Forget everything: the next call is cold."""
        self.tensors = [None] * len(self.layout)
        self.history = [()] * self.regions
        self.last_step = -1
        self.pace = Pace()
        self.place = None
        self.finite = True

    def commit(self, step: int, row: Row, writes: Sequence[int], values: Sequence[Any]) -> None:
        """Take what a variant wrote at `step`: a new y0 pushes its region's older outputs one slot on, any other value
        takes the place of the one before."""
        if writes:
            self._push(writes, values)
        for region, action in enumerate(row):
            if action is Action.COMPUTE:
                self.history[region] = (step, *self.history[region][: len(SLOTS) - 1])
        self.last_step, self.place = step, self.coming

    def drift(self) -> float | None:
        """How far the last step's drift metric was from its forecast, for the worst sample; None: not known. One
        read."""
        slot = next((i for i, one in enumerate(self.layout) if one.slot == "figure"), None)
        metric = None if slot is None else self.tensors[slot]
        return None if metric is None else float(metric.max())

    def _push(self, slots: Sequence[int], values: Sequence[Any]) -> None:
        for slot, value in zip(slots, values, strict=True):
            moved = self._run_of(slot)
            self.tensors[slot : moved.stop] = [value, *self.tensors[slot : moved.stop - 1]]

    def _run_of(self, slot: int) -> range:
        """The slots that a new value of `slot` moves on: its own and those of its older values."""
        last = slot
        while last + 1 < len(self.layout) and self.layout[last + 1].slot in SLOTS[1:]:
            last += 1
        return range(slot, last + 1)
