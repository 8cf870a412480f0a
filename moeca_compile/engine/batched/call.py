"""One call of a compiled model for several requests, each at a step of its own: their state joined, run, cut apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moeca_compile.engine.batched.forms import Forms, program_of
from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.engine.hoisted import Hoisted
from moeca_compile.engine.trajectory_state import Stream
from moeca_compile.graph.variant import Variant
from moeca_compile.runtime.batched.pool import PooledState
from moeca_compile.runtime.state import StreamState
from moeca_compile.schedule import Row


class PlannedCall(NamedTuple):
    """A request's next step before it runs.

    Attributes:
        step: its number, from 0.
        row: of the schedule.
        cold: state was missing, so that everything is computed.
        variant: of the row, for one sample.
        leaves: of the inputs.
        batch: number of samples.
        timestep: of the call; None: it wasn't read.
        stream: state and hoisted values of the request.
        generation: of the state that was planned with.
    """

    step: int
    row: Row
    cold: bool
    variant: Variant
    leaves: Sequence[Any]
    batch: int
    timestep: float | None
    stream: Stream
    generation: int

    @property
    def name(self) -> str:
        """Of the variant."""
        return self.variant.name

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the variant, for one sample."""
        return self.variant.macs


def run_together(
    forms: Forms, compiled: CompiledSchedule, args: Sequence[Any], plans: Sequence[PlannedCall], padding: int
) -> tuple[tuple[Any, ...], list[list[torch.Tensor]]]:
    """Run a variant once.

    Args:
        forms: of the calls.
        compiled: the schedule for a call of this batch.
        args: of the captured graph, for all requests, with `padding` copies of the last sample.
        plans: of the requests, which have one row and equal coefficients.
        padding: number of samples that nobody asked for.

    Returns:
        The graph's outputs, and for each request a tensor for each slot that the variant writes.
    """
    variant, states = compiled.variants.variant(plans[0].row), [_pooled(planned) for planned in plans]
    hoisted = _hoisted(forms, compiled, variant, args, plans, padding)
    joint = _joint_state(forms, states, variant.reads, padding)
    arguments = compiled.arguments(variant, args, joint, plans[0].step, hoisted)
    run = compiled.variants.executables.get(variant.row) or compiled.variants.compile(variant, arguments)
    try:
        results = run(arguments)
    except BaseException:
        for state in states:
            state.clear()
        raise
    outputs, written = tuple(results[: variant.outputs]), results[variant.outputs :]
    parts, first = list[list[torch.Tensor]](), 0
    for planned, state in zip(plans, states, strict=True):
        pairs = zip(variant.writes, written, strict=True)
        parts.append([forms.slots[slot].part(tensor, first, planned.batch) for slot, tensor in pairs])
        for slot in variant.changes:
            state.overwrite(slot, forms.slots[slot].part(joint.tensors[slot], first, planned.batch))
        first += planned.batch
    return outputs, parts


def _pooled(planned: PlannedCall) -> PooledState:
    assert isinstance(planned.stream.state, PooledState)
    return planned.stream.state


def _joint_state(forms: Forms, states: Sequence[PooledState], slots: Sequence[int], padding: int) -> StreamState:
    """The state of several requests as that of one call, with the history of the first. Slots that nobody wrote stay
    empty."""
    first = states[0]
    joint = StreamState(first.layout, first.regions)
    joint.history, joint.last_step = first.history, first.last_step
    joint.place, joint.coming = first.place, first.coming
    for slot in slots:
        if any(state.tensors[slot] is not None for state in states):
            joint.tensors[slot] = forms.slots[slot].joined([state.read(slot) for state in states], padding)
    return joint


def _hoisted(
    forms: Forms, compiled: CompiledSchedule, variant: Variant, args: Sequence[Any], plans: Sequence[PlannedCall],
    padding: int,
) -> list[torch.Tensor]:  # fmt: skip
    """The hoisted values that a variant reads. What holds for a trajectory is kept for each request; if one of them
    lacks a value, it is computed for all."""
    prologues = program_of(compiled).prologues
    needed = set(variant.hoists) & forms.invariant
    of_step = tuple(position for position in variant.hoists if position not in forms.invariant)
    if of_step:
        needed |= set(prologues.prologue(of_step, args)[0].hoists)
    joint, kept = Hoisted(), [planned.stream.hoisted.fixed for planned in plans]
    for position in needed:
        if all(position in fixed for fixed in kept):
            joint.fixed[position] = forms.hoisted[position].joined([fixed[position] for fixed in kept], padding)
    known = set(joint.fixed)
    values = joint.of(prologues, variant.hoists, args, None)
    for position in joint.fixed.keys() - known:
        first = 0
        for planned, fixed in zip(plans, kept, strict=True):
            fixed[position] = forms.hoisted[position].part(joint.fixed[position], first, planned.batch).clone()
            first += planned.batch
    return values
