"""A variant: the straight-line program of one distinct schedule row, and what it takes in and hands out. Pure data.

A prologue is one too: of no row, it gives values that variants share (`passes/analysis/find_hoisted.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moeca_compile.schedule import Row

SLOTS = ("y0", "y1", "y2")  # a region's output at the steps that computed it last, latest first


@dataclass(frozen=True, slots=True)
class StateSlot:
    """One cache tensor. `slot` is one of `SLOTS`, or says what it holds of a region whose tokens age one by one.

    `name` is zero-padded: Triton mixes up states whose input and output names sort apart.
    """

    name: str
    region: int
    output: int
    slot: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int


@dataclass(frozen=True)
class Variant:
    """The program of `row`.

    It takes the inputs at positions `takes` of the captured call, then the hoisted values `hoists` (positions in the
    program's list), then the state slots `reads` (positions in the layout), then, if `wants_now`, step + 1 as a float32
    scalar, and if `wants_coefficients`, the table [regions, 2] float32. It returns the model's `outputs` values and
    then new values for the slots `writes`. A new y0 moves what was y0 on to y1, and so on, without a copy.
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
