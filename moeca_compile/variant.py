"""A variant: the straight-line program of one distinct schedule row, and what it takes in and hands out. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moeca_compile.schedule import Row

SLOTS = ("y", "d1", "d2")  # the value, and the first two divided differences of Newton's form
DISTANCES = ("s-s0", "(s-s0)(s-s1)", "1/(s-s0)", "1/(s-s1)")  # columns of the distance table, a row per region


@dataclass(frozen=True, slots=True)
class StateSlot:
    """One cache tensor. `name` is zero-padded: Triton mixes up states whose input and output names sort apart."""

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

    It takes the inputs at positions `takes` of the captured call, then the state slots `reads` (positions in the
    layout), then, if `wants_distances`, the table [regions, 4] float32. It returns the model's `outputs` values and
    then the slots `writes`.
    """

    name: str
    row: Row
    gm: Any  # torch.fx.GraphModule; this file must import without torch
    takes: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    wants_distances: bool
    outputs: int
    macs: int = 0
    node_count: int = field(default=0, compare=False)
