"""Which state a schedule keeps: for each region its last outputs, or one value a token or branch with its own age."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from moeca_compile.dtypes import name_of
from moeca_compile.errors import ScheduleError
from moeca_compile.graph.regions import Region, RegionMap, Value
from moeca_compile.graph.variant import KEYS, MODEL, SLOTS, STAMPS, Slot, StateSlot, item_slots
from moeca_compile.passes.partial.item_state import wide
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.control import NARROW

Entry = tuple[int, Slot, tuple[int, ...], str]  # output, slot, shape, dtype


def state_layout(regions: RegionMap, schedule: Schedule) -> tuple[StateSlot, ...]:
    """The state that `schedule` (fitted to these regions) keeps, in the order of the regions."""
    slots: list[StateSlot] = []
    entries = {column: _entries(region, schedule, column) for column, region in enumerate(regions)}
    if schedule.adaptive is not None:
        entries[MODEL] = _signal(regions, schedule.order)
    for column, column_entries in entries.items():
        cuts = regions.regions[max(column, 0)].cuts
        for output, slot, shape, dtype in column_entries:
            device = cuts[min(output, len(cuts) - 1)].device
            size = math.prod(shape) * getattr(torch, dtype).itemsize
            slots.append(StateSlot(f"state_{len(slots):03d}", column, output, slot, shape, dtype, device, size))
    return tuple(slots)


def _signal(regions: RegionMap, order: int) -> Iterator[Entry]:
    """What an adaptive schedule watches: one item a sample, and the figure that it decides by."""
    if regions.signal is None:
        raise ScheduleError("an adaptive schedule has nothing to watch: no stream with a batch enters the first region")
    batch, *sizes = regions.signal.shape
    yield from _value(0, Value(regions.signal.node, (batch, math.prod(sizes)), regions.signal.dtype), order)
    yield 0, Slot.FIGURE, (batch,), "float32"


def _entries(region: Region, schedule: Schedule, column: int) -> Iterator[Entry]:
    if schedule.partials(column):
        return _item_states(region, schedule)
    return _region_outputs(region, schedule.depth(column))


def _region_outputs(region: Region, depth: int) -> Iterator[Entry]:
    for output, cut in enumerate(region.cuts):
        for slot in SLOTS[:depth]:
            yield output, slot, cut.shape, cut.dtype


def _item_states(region: Region, schedule: Schedule) -> Iterator[Entry]:
    info, score = region.divisible(), schedule.control.score
    items = (info.batch, info.tokens)
    first = 0
    if info.branches is not None:
        branches = info.branches.value
        first, (*slots, _) = 1, branches.shape
        yield 0, Slot.HELD, tuple(slots), "int64"
        yield 0, Slot.GATES, tuple(slots), _wide(branches.dtype)
        for output, slot, shape, dtype in _value(0, branches, schedule.order):
            narrow = schedule.control.kept == NARROW and slot not in STAMPS
            yield output, slot, shape, NARROW if narrow else dtype
        if score == "drift":
            yield 0, Slot.DRIFT, tuple(slots), "float32"
            yield 0, Slot.SCORES, (*items, info.branches.num_experts), "float32"
        else:
            yield 0, Slot.ERROR, tuple(slots), "float32"
    for output, part in enumerate(info.parts, first):
        yield from _value(output, part, schedule.order)
        if info.enters is not None and score == "drift":
            yield output, Slot.DRIFT, items, "float32"
            yield output, Slot.ENTERED, info.enters.shape, info.enters.dtype
        elif info.enters is not None:
            yield output, Slot.ERROR, items, "float32"
    for slot, key in zip(KEYS, info.keys, strict=False):
        yield 0, slot, key.shape, key.dtype


def _value(output: int, value: Value, order: int) -> Iterator[Entry]:
    for slot in item_slots(order):
        if slot in STAMPS:
            yield output, slot, value.shape[:-1], "float32"
        else:
            yield output, slot, value.shape, value.dtype if slot is Slot.Y else _wide(value.dtype)


def _wide(dtype: str) -> str:
    return name_of(wide(getattr(torch, dtype)))
