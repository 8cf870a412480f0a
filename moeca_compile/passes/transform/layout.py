"""Which state a schedule keeps: for each region its last outputs, or one value a token or branch with its own age."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from moeca_compile.dtypes import name_of
from moeca_compile.errors import ScheduleError
from moeca_compile.graph.regions import Region, RegionMap, Value
from moeca_compile.graph.variant import KEYS, SLOTS, STAMPS, Slot, StateSlot
from moeca_compile.passes.partial.kept import slots_of, wide
from moeca_compile.schedule import Schedule

MODEL = -1  # in place of a region: state that belongs to the whole graph
Entry = tuple[int, Slot, tuple[int, ...], str]  # output, slot, shape, dtype


def state_layout(regions: RegionMap, schedule: Schedule) -> tuple[StateSlot, ...]:
    """The state that `schedule` (fitted to these regions) keeps, in the order of the regions."""
    slots: list[StateSlot] = []
    kept = {
        column: _aging(region, schedule) if schedule.partials(column) else _whole(region, schedule.depth(column))
        for column, region in enumerate(regions)
    }
    if schedule.adaptive is not None:
        kept[MODEL] = _signal(regions, schedule.order)
    for column, found in kept.items():
        devices = regions.regions[max(column, 0)].devices
        for output, slot, shape, dtype in found:
            device = devices[min(output, len(devices) - 1)]
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


def _whole(region: Region, depth: int) -> Iterator[Entry]:
    for output, (shape, dtype) in enumerate(zip(region.shapes, region.dtypes, strict=True)):
        for slot in SLOTS[:depth]:
            yield output, slot, shape, dtype


def _aging(region: Region, schedule: Schedule) -> Iterator[Entry]:
    info, score = region.divisible(), schedule.control.score
    items = (info.batch, info.tokens)
    first = 0
    if info.branches is not None:
        branches = info.branches.value
        first, (*slots, _) = 1, branches.shape
        yield 0, Slot.HELD, tuple(slots), "int64"
        yield 0, Slot.GATES, tuple(slots), _wide(branches.dtype)
        yield from _value(0, branches, schedule.order)
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
    for slot, one in zip(KEYS, info.keys, strict=False):
        yield 0, slot, one.shape, one.dtype


def _value(output: int, one: Value, order: int) -> Iterator[Entry]:
    for slot in slots_of(order):
        if slot in STAMPS:
            yield output, slot, one.shape[:-1], "float32"
        else:
            yield output, slot, one.shape, one.dtype if slot is Slot.Y else _wide(one.dtype)


def _wide(dtype: str) -> str:
    return name_of(wide(getattr(torch, dtype)))
