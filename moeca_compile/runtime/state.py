"""The cached state of one stream: a tensor for each slot, and the steps at which each region was computed. No torch
here: tensors are opaque."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moeca_compile.graph.variant import SLOTS, Slot, StateSlot
from moeca_compile.runtime.pace import Pace
from moeca_compile.schedule import Action, Row
from moeca_compile.schedule.forecast import MAX_KEPT
from moeca_compile.schedule.timeline import TimelinePosition


class Answer(Protocol):
    """A boolean that a device may still be computing."""

    def ready(self) -> bool:
        """Whether `holds` returns without waiting for the device."""

    def holds(self) -> bool:
        """The boolean; waits for the device."""


@dataclass(slots=True)
class StreamState:
    """State of one stream of a trajectory.

    Attributes:
        layout: the slots; y0 to y3 of one region output are adjacent, in this order.
        regions: number of columns of the schedule.
        tensors: one for each slot of `layout`; None: never written.
        history: for each region, the steps whose outputs are cached, latest first.
        last_step: the last step that was committed; -1: none.
        depths: for each region, how many of its outputs the layout holds.
        pace: the adaptive schedule's state of the stream.
        place: position in a schedule with timesteps; None: before the first step.
        coming: becomes `place` when the current step is committed.
        finite: whether the model's output at `finite_step` is finite.
        finite_step: the last step that wrote state.
        expected: after a first step, the next latent by the sampler that weights were fitted for, and the norm of its
            change; see `runtime/sampler_check.py`.
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
    expected: tuple[Any, float] | None = None

    def __post_init__(self) -> None:
        self.depths = [0] * self.regions
        for slot in self.layout:
            if slot.slot in SLOTS:
                self.depths[slot.region] = max(self.depths[slot.region], SLOTS.index(slot.slot) + 1)
        self.clear()

    def clear(self) -> None:
        """Drop everything: the next call is cold."""
        self.tensors = [None] * len(self.layout)
        self.history = [()] * self.regions
        self.last_step = -1
        self.pace = Pace()
        self.place = None
        self.finite = True
        self.expected = None

    def commit(self, step: int, row: Row, writes: Sequence[int], values: Sequence[Any]) -> None:
        """Store what a variant wrote.

        A new y0 moves the region's older outputs one slot on. Any other value replaces the one before.

        Args:
            step: number of the call, from 0.
            row: what ran.
            writes: numbers of the slots that the variant wrote.
            values: one tensor for each of these slots.
        """
        if writes:
            self._push(writes, values)
        for region, action in enumerate(row):
            if action is Action.COMPUTE:
                self.history[region] = (step, *self.history[region][: MAX_KEPT - 1])
        self.last_step, self.place = step, self.coming

    def drift(self) -> float | None:
        """The last step's drift metric, for the worst sample; None: none was measured. Reads one tensor on the
        host."""
        for spec, metric in zip(self.layout, self.tensors, strict=True):
            if spec.slot == Slot.FIGURE:
                return None if metric is None else float(metric.max())
        return None

    def _push(self, slots: Sequence[int], values: Sequence[Any]) -> None:
        for slot, value in zip(slots, values, strict=True):
            end = self._moved_by(slot).stop
            self.tensors[slot:end] = [value, *self.tensors[slot : end - 1]]

    def _moved_by(self, slot: int) -> range:
        """The slots that a new value of `slot` moves on: its own and those of its older values."""
        end = slot + 1
        while end < len(self.layout) and self.layout[end].slot in SLOTS[1:]:
            end += 1
        return range(slot, end)
