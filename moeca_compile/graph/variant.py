"""A variant: the straight-line program of one distinct schedule row, and what it takes in and hands out. Pure data.

A prologue is one too: of no row, it gives values that variants share (`passes/analysis/find_hoisted.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from moeca_compile.schedule import Row


class Slot(StrEnum):
    """What one state tensor holds. Bundles write the values down, so a value stays as it is.

    A region that every row computes or reuses as a whole has one tensor for each of `SLOTS` that its schedule needs.
    They stand next to each other in the layout, latest first: a new Y0 moves each of them on to the next place.

    A region that some row computes in part keeps tokens (or expert branches) that age one by one: of each item its
    value and what a forecast needs (`ITEM`), and what says how much the item wants to be computed. All other slots are
    replaced in place.
    """

    Y0 = "y0"  # the region's output at the last step that computed it
    Y1 = "y1"  # at the step before that which computed it
    Y2 = "y2"
    Y3 = "y3"
    Y = "y"  # [.., D] the item's last computed value
    AT = "at"  # [..] float32, the step of that value + 1; 0: never
    D1 = "d1"  # [.., D] first divided difference of the value over steps
    D2 = "d2"  # [.., D] second divided difference
    BEFORE = "before"  # [..] float32, the stamp of the value before
    DRIFT = "drift"  # [..] float32, L1 distance that what enters has moved since the value was computed
    ERROR = "error"  # [..] float32, mean absolute error of the forecast when the value was last computed
    ENTERED = "seen"  # [B, N, D] what entered the region at the last step
    HELD = "held"  # [B, N, K] int64, the expert + 1 whose branch is kept there; 0: none
    GATES = "gates"  # [B, N, K] the gate weights of the branches kept
    SCORES = "scores"  # [B, N, E] float32, the router's scores at the last step
    KEYS0 = "keys0"  # an attention's keys, of all tokens
    KEYS1 = "keys1"  # and its values
    FIGURE = "figure"  # [B] float32, how far the watched stream is from its forecast; of the whole graph


SLOTS = (Slot.Y0, Slot.Y1, Slot.Y2, Slot.Y3)  # a region's outputs in order of age, latest first; MAX_KEPT of them
ITEM = (Slot.Y, Slot.AT, Slot.D1, Slot.D2, Slot.BEFORE)  # what is kept of a value that ages by itself
KEYS = (Slot.KEYS0, Slot.KEYS1)  # what every token of an attention reads of all others
MODEL = -1  # in place of a region: state that belongs to the whole graph
STAMPS = frozenset({Slot.AT, Slot.BEFORE})  # one number an item, not a vector


def item_slots(order: int) -> tuple[Slot, ...]:
    """What is kept of a value that ages by itself, for a forecast of this order: value and stamp, first difference,
    second and its stamp."""
    return ITEM[: (2, 3, 5)[order]]


@dataclass(frozen=True, slots=True)
class StateSlot:
    """One cache tensor: what it holds (`slot`) of an output of a region.

    `name` is zero-padded: Triton mixes up states whose input and output names sort apart.
    """

    name: str
    region: int
    output: int
    slot: Slot
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int


@dataclass(frozen=True)
class Variant:
    """The program of `row`.

    It takes the inputs at positions `takes` of the captured call, then the hoisted values `hoists` (positions in the
    program's list), then the state slots `reads` (positions in the layout), then, if `wants_now`, step + 1 as a float32
    scalar, and if `wants_coefficients`, the table [regions, MAX_KEPT] float32. It returns the model's `outputs` values
    and then new values for the slots `writes`. A new y0 moves what was y0 on to y1, and so on, without a copy.

    The slots `changes`, which are among `reads`, it changes in place: nobody else may hold these tensors, and a run
    that fails leaves them spoilt.
    """

    name: str
    row: Row
    gm: Any  # torch.fx.GraphModule; this file must import without torch
    takes: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    wants_coefficients: bool
    wants_now: bool
    outputs: int
    hoists: tuple[int, ...] = ()
    macs: int = 0  # those of what was hoisted with them
    node_count: int = field(default=0, compare=False)
    changes: tuple[int, ...] = ()
