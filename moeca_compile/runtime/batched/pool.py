"""The state of all requests: one array for each slot, allocated once. A request has the lanes of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moeca_compile.graph.variant import StateSlot
from moeca_compile.runtime.state import StreamState


class StatePool:
    """State for `lanes` samples. A request of n samples takes n adjacent lanes.

    Args:
        layout: the slots of one sample.
        axes: for each slot, the axis along which samples lie.
        lanes: how many samples have room.
        regions: number of columns of the schedule.
        zeros: allocates the tensor of a slot, of a shape.
    """

    def __init__(
        self, layout: Sequence[StateSlot], axes: Sequence[int], lanes: int, regions: int,
        zeros: Callable[[StateSlot, Sequence[int]], Any],
    ) -> None:  # fmt: skip
        self.lanes, self.regions, self.axes = lanes, regions, tuple(axes)
        self._sizes = [slot.shape[axis] for slot, axis in zip(layout, axes, strict=True)]
        self._arrays = []
        for slot, axis in zip(layout, axes, strict=True):
            shape = list(slot.shape)
            shape[axis] *= lanes
            self._arrays.append(zeros(slot, shape))
        self._free = [(0, lanes)]  # adjacent lanes that nobody has: first, and the one after the last

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self._arrays)

    @property
    def free(self) -> int:
        """How many lanes nobody has."""
        return sum(end - first for first, end in self._free)

    def take(self, count: int) -> int | None:
        """The first of `count` adjacent lanes, which are the caller's now; None: there are none."""
        for place, (first, end) in enumerate(self._free):
            if end - first >= count:
                self._free[place : place + 1] = [(first + count, end)] if end - first > count else []
                return first
        return None

    def give_back(self, first: int, count: int) -> None:
        """Make lanes free."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self._free, (first, first + count)]):
            if merged and merged[-1][1] == start:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((start, end))
        self._free = merged

    def view(self, slot: int, first: int, count: int) -> Any:
        """A slot's values for adjacent lanes."""
        size, axis = self._sizes[slot], self.axes[slot]
        index = [slice(None)] * axis + [slice(first * size, (first + count) * size)]
        return self._arrays[slot][tuple(index)]


class PooledState(StreamState):
    """The state of one stream, whose tensors are views of a pool.

    Args:
        layout: the slots, for the stream's batch.
        pool: with room for `batch` samples from lane `first` on.
        first: its first lane.
        batch: how many lanes it has.
    """

    __slots__ = ("_views",)

    def __init__(self, layout: tuple[StateSlot, ...], pool: StatePool, first: int, batch: int) -> None:
        super().__init__(layout, pool.regions)
        self._views = [pool.view(slot, first, batch) for slot in range(len(layout))]

    def read(self, slot: int) -> Any:
        """A slot's values; zeros: it was never written."""
        if self.tensors[slot] is None:
            self._views[slot][...] = 0
        return self._views[slot]

    def overwrite(self, slot: int, values: Any) -> None:
        """Take these for a slot's values; nothing moves on."""
        self._views[slot][...] = values
        self.tensors[slot] = self._views[slot]

    def _push(self, slots: Sequence[int], values: Sequence[Any]) -> None:
        for slot, value in zip(slots, values, strict=True):
            for older in reversed(self._moved_by(slot)[1:]):
                if self.tensors[older - 1] is not None:
                    self._views[older][...] = self._views[older - 1]
                    self.tensors[older] = self._views[older]
            self._views[slot][...] = value
            self.tensors[slot] = self._views[slot]
