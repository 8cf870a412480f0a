"""The forms of a compiled model's shared calls: its schedule compiled for each batch, and where samples lie in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moeca_compile.engine.batched.samples import samples_of
from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.engine.program import Program
from moeca_compile.errors import StateError
from moeca_compile.graph.variant import StateSlot
from moeca_compile.lowering.inductor.buffers import zeros_of
from moeca_compile.runtime.batched.budget import Needs


class Forms:
    """A schedule compiled for calls of several batches.

    Args:
        compiled: by batch, among them 1.

    Attributes:
        compiled: as given.
        home: of one sample; its step rule serves all.
        slots: where samples lie in each slot of the state.
        hoisted: the same for hoisted values.
        invariant: positions of the hoisted values that hold for a trajectory.

    Raises:
        StateError: the graphs of two batches differ, or a tensor can't be cut into samples.
    """

    def __init__(self, compiled: Mapping[int, CompiledSchedule]) -> None:
        self.compiled, self.home = compiled, compiled[1]
        layouts = {batch: one.layout for batch, one in compiled.items()}
        hoisted = {batch: program_of(one).prologues.shapes for batch, one in compiled.items()}
        if len({(len(layouts[batch]), len(hoisted[batch])) for batch in compiled}) > 1:
            raise StateError(
                f"the model's graphs differ between batches of {', '.join(map(str, compiled))}: requests can't share a "
                "call of this model"
            )
        self.slots = [
            samples_of({batch: layout[number].shape for batch, layout in layouts.items()}, f"state {slot.name}")
            for number, slot in enumerate(self.home.layout)
        ]
        if any(samples.axis is None for samples in self.slots):
            raise StateError(
                "a part of the state doesn't depend on the batch: requests can't share a call of this model"
            )
        self.hoisted = [
            samples_of({batch: shapes[number] for batch, shapes in hoisted.items()}, "a hoisted value")
            for number in range(len(hoisted[1]))
        ]
        values = program_of(self.home).prologues.hoisted
        self.invariant = frozenset(number for number, value in enumerate(values) if value.level != "step")


def program_of(compiled: CompiledSchedule) -> Program:
    """The captured graph of a schedule."""
    assert isinstance(compiled.program, Program)
    return compiled.program


def needs_of(home: CompiledSchedule, inputs: int) -> Needs:
    """What one sample needs.

    Args:
        home: the schedule, compiled for one sample.
        inputs: bytes of a sample's inputs, which are copied where hoisted values depend on them.
    """
    layout, hoisted = home.layout, program_of(home).prologues.hoisted
    kept = sum(value.bytes for value in hoisted if value.level != "step")
    calls = [0]
    for row in home.schedule.distinct_rows():
        variant = home.variants.variant(row)
        read = sum(layout[slot].bytes for slot in variant.reads)
        written = sum(layout[slot].bytes for slot in variant.writes)
        calls.append(read + written + sum(hoisted[number].bytes for number in variant.hoists))
    return Needs(sum(slot.bytes for slot in layout) + kept + (inputs if kept else 0), max(calls))


def zeros(slot: StateSlot, shape: Sequence[int]) -> torch.Tensor:
    """The pool's tensor of a slot."""
    return zeros_of(replace(slot, shape=tuple(shape)))
