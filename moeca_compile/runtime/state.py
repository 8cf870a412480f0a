"""The cache of one stream: outputs by slot, and when each region computed them. No torch: tensors are opaque."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moeca_compile.graph.variant import SLOTS, StateSlot
from moeca_compile.runtime.pace import Pace
from moeca_compile.schedule import Action, Row
from moeca_compile.schedule.forecast import newton
from moeca_compile.schedule.timeline import Place

Coefficients = tuple[tuple[float, float], ...]


@dataclass(slots=True)
class StreamState:
    """State of one stream of a trajectory.

    Attributes:
        layout: the slots; y0, y1, y2 of one region output stand together, in this order.
        regions: how many columns the schedule has.
        tensors: by slot; None: never written.
        history: by region, the steps whose outputs are kept, latest first.
        depths: by region, how many of its outputs the layout keeps.
        pace: what an adaptive schedule knows of the stream.
        place: where the stream is in a schedule with timesteps; None: nowhere yet.
        coming: `place` once the step that runs now is kept.
    """

    layout: tuple[StateSlot, ...]
    regions: int
    tensors: list[Any] = field(init=False)
    history: list[tuple[int, ...]] = field(init=False)
    last_step: int = -1
    depths: list[int] = field(init=False)
    pace: Pace = field(default_factory=Pace)
    place: Place | None = None
    coming: Place | None = None
    _kept: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])  # a history; of it what a forecast takes

    def __post_init__(self) -> None:
        self.depths = [0] * self.regions
        for one in self.layout:
            if one.slot in SLOTS:
                self.depths[one.region] = max(self.depths[one.region], SLOTS.index(one.slot) + 1)
        self.clear()

    def clear(self) -> None:
        """Forget everything: the next call is cold."""
        self.tensors = [None] * len(self.layout)
        self.history = [()] * self.regions
        self.last_step = -1
        self.pace = Pace()
        self.place = None

    def can_run(self, row: Row, step: int) -> bool:
        """Whether every region that `row` doesn't compute has a value, written without a gap in this stream."""
        if self.last_step != step - 1:
            return False
        missing = [action for action, seen in zip(row, self.history, strict=True) if not seen]
        return all(action is Action.COMPUTE for action in missing)

    def coefficients(self, step: int) -> Coefficients:
        """Per region c0 and c1 of the forecast y0 + c0 (y0 - y1) + c1 (y1 - y2) for `step`: Newton's polynomial through
        the outputs that are kept, gathered by differences; 0 where history is missing, so a lower order then."""
        if self._kept[0] != self.history:  # most steps compute nothing
            kept = [seen[:depth] for seen, depth in zip(self.history, self.depths, strict=True)]
            self._kept = list(self.history), kept
        found = {seen: newton(step, seen) for seen in set(self._kept[1])}  # and most regions the same steps
        return tuple([found[seen] for seen in self._kept[1]])

    def commit(self, step: int, row: Row, writes: Sequence[int], values: Sequence[Any]) -> None:
        """Take what a variant wrote at `step`: a new y0 pushes its region's older outputs one slot on, any other value
        takes the place of the one before."""
        if writes:
            self._push(writes, values)
        computed = [region for region, action in enumerate(row) if action is Action.COMPUTE]
        for region in computed:
            self.history[region] = (step, *self.history[region][: len(SLOTS) - 1])
        self.last_step, self.place = step, self.coming
        self.pace.ran(len(computed) == len(row))

    def figure(self) -> float | None:
        """How far the last step's signal was from its forecast, for the worst sample; None: not known. One read."""
        found = next((i for i, one in enumerate(self.layout) if one.slot == "figure"), None)
        kept = None if found is None else self.tensors[found]
        return None if kept is None else float(kept.max())

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
