"""State that stays where it is: one set of tensors for each stream, used again by the next trajectory.

What is recorded with addresses (a CUDA graph) reads the state where it lay when it was recorded. So a new value is
copied into its slot here, where `StreamState` keeps the tensor itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from moeca_compile.graph.variant import StateSlot
from moeca_compile.runtime.state import StreamState

Set = list[torch.Tensor]


class Buffers:
    """The sets of one program, by layout; those of streams that are gone are handed out again."""

    def __init__(self) -> None:
        self._free: dict[tuple[StateSlot, ...], list[Set]] = {}

    def state(self, layout: tuple[StateSlot, ...], regions: int) -> StreamState:
        """A stream's state in a set of its own, all zeros; the set comes back when the state is gone."""
        free = self._free.setdefault(layout, [])
        tensors = free.pop() if free else [zeros_of(slot) for slot in layout]
        state = _Fixed(layout, regions, tensors)
        weakref.finalize(state, free.append, tensors)
        return state


class _Fixed(StreamState):  # no __slots__: it can be referred to weakly
    def __init__(self, layout: tuple[StateSlot, ...], regions: int, tensors: Set) -> None:
        self.fixed = tensors
        super().__init__(layout, regions)

    def clear(self) -> None:
        super().clear()
        self.tensors = self.fixed
        for one in self.fixed:  # never read before it is written, but 0 times NaN is NaN
            one.zero_()

    def _push(self, slots: Sequence[int], values: Sequence[Any]) -> None:
        moved = [self._moved_by(slot) for slot in slots]
        for back in range(max(map(len, moved), default=0) - 1, 0, -1):  # the oldest first: it is written over
            to = [run[back] for run in moved if len(run) > back]
            copy_all([self.fixed[slot] for slot in to], [self.fixed[slot - 1] for slot in to])
        copy_all([self.fixed[slot] for slot in slots], values)


def zeros_of(slot: StateSlot) -> torch.Tensor:
    """A tensor for a slot, of a kind that may be written inside and outside inference mode."""
    with torch.inference_mode(False):
        return torch.zeros(slot.shape, dtype=getattr(torch, slot.dtype), device=slot.device)


def copy_all(to: Sequence[torch.Tensor], of: Sequence[torch.Tensor]) -> None:
    """Each into its own, a launch for each pair of dtypes: torch takes a list of several dtypes one by one."""
    kinds: dict[Any, tuple[Set, Set]] = {}
    for one, other in zip(to, of, strict=True):
        for group, tensor in zip(kinds.setdefault((one.dtype, other.dtype), ([], [])), (one, other), strict=True):
            group.append(tensor)
    for targets, sources in kinds.values():
        torch._foreach_copy_(targets, sources)
