"""Whether a sample gets the same bits in calls of several batches: a property of the kernels, which is tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moeca_compile.engine.batched.forms import Forms, program_of
from moeca_compile.engine.batched.samples import Samples
from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.engine.hoisted import Hoisted
from moeca_compile.graph.content import bits
from moeca_compile.lowering.inductor.buffers import zeros_of
from moeca_compile.schedule.forecast import MAX_KEPT

Found = list[list[torch.Tensor]]  # for each sample, its parts of all that the variants give


def run_rows(
    forms: Forms, compiled: CompiledSchedule, args: Sequence[Any], numbers: Sequence[int], outputs: Sequence[Samples]
) -> tuple[tuple[Any, ...], Found]:
    """Run each row once on made-up state: standard normal numbers, which depend on the sample alone.

    Args:
        forms: of the calls.
        compiled: the schedule for a call of as many samples.
        args: of the captured graph.
        numbers: of the samples, in their order in the call.
        outputs: where samples lie in each of the graph's outputs.

    Returns:
        The graph's outputs of the row that computes everything, and what each sample got.
    """
    state = [forms.slots[slot].joined([_value(forms, slot, n) for n in numbers], 0) for slot in range(len(forms.slots))]
    table = torch.rand(len(compiled.driver.full), MAX_KEPT, generator=torch.Generator().manual_seed(0))
    found: Found = [[] for _ in numbers]
    first: tuple[Any, ...] = ()
    for row in compiled.schedule.distinct_rows():
        variant = compiled.variants.variant(row)
        arguments = [
            *(args[i] for i in variant.takes),
            *Hoisted().of(program_of(compiled).prologues, variant.hoists, args, None),
            *(state[slot].clone() for slot in variant.reads),
        ]
        if variant.wants_now:
            arguments.append(torch.full((), 3.0, device=compiled.device))
        if variant.wants_coefficients:
            arguments.append(table.to(compiled.device))
        changed = arguments[len(variant.takes) + len(variant.hoists) :][: len(variant.reads)]
        results = compiled.variants.compile(variant, arguments)(arguments)
        first = first or tuple(results[: variant.outputs])
        pairs = [
            *zip(results[: variant.outputs], outputs, strict=True),
            *zip(results[variant.outputs :], (forms.slots[slot] for slot in variant.writes), strict=True),
            *((changed[variant.reads.index(slot)], forms.slots[slot]) for slot in variant.changes),
        ]
        for place, parts in enumerate(found):
            parts += [
                samples.part(value, place, 1).clone() for value, samples in pairs if isinstance(value, torch.Tensor)
            ]
    return first, found


def are_equal(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    """Whether a sample got the same bits in two calls."""
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True))


def _value(forms: Forms, slot: int, sample: int) -> torch.Tensor:
    value = zeros_of(forms.home.layout[slot])
    if value.is_floating_point():
        generator = torch.Generator().manual_seed(1000 * sample + slot)
        value.copy_(torch.randn(value.shape, generator=generator))
    return value
