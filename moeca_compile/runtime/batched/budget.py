"""How many samples have room in a byte budget."""

from __future__ import annotations

import math
from typing import NamedTuple

from moeca_compile.errors import OptionError, StateError
from moeca_compile.runtime.bundle.bfloat16 import stored_dtype
from moeca_compile.runtime.bundle.manifest import Manifest, TensorSpec


class Needs(NamedTuple):
    """Bytes that a batched session needs.

    Attributes:
        lane: of one sample as long as its request lives: its state and hoisted values.
        call: of one sample while it is part of a call: copies of what the graph reads and writes.
    """

    lane: int
    call: int


def needs_of(manifest: Manifest) -> Needs:
    """What a sample of a bundle needs."""
    state = {spec.name: bytes_of(spec) for spec in manifest.state}
    hoisted = {spec.name: bytes_of(spec) for spec in manifest.hoisted}
    inputs = sum(map(bytes_of, manifest.inputs)) if hoisted else 0  # copies, to see whether a prologue must run
    calls = [
        sum(state[name] for name in variant.reads)
        + 2 * sum(state[name] for name in variant.writes)  # the runtime's value and its copy
        + 2 * sum(hoisted[name] for name in variant.hoists)
        for variant in manifest.variants
    ]
    if manifest.caches_output:  # what is kept are copies of outputs, made beside the graph
        calls.append(2 * sum(state.values()))
    return Needs(sum(state.values()) + sum(hoisted.values()) + inputs, max(calls))


def bytes_of(spec: TensorSpec) -> int:
    """Of one sample."""
    return math.prod(spec.sizes(1)) * int(stored_dtype(spec.dtype).itemsize)


def lanes_in(budget: int, needs: Needs, max_batch: int) -> int:
    """How many samples a budget has room for.

    Args:
        budget: bytes.
        needs: of one sample.
        max_batch: samples of one call, at most.

    Raises:
        OptionError: a number that can't be.
        StateError: there is no room for a single sample.
    """
    numbers: dict[str, object] = {"budget": budget, "max_batch": max_batch}
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{name}={value!r}: expected a whole number from 1 on")
    lanes = (budget - max_batch * needs.call) // max(needs.lane, 1)
    if lanes < 1:
        least = needs.lane + max_batch * needs.call
        raise StateError(
            f"budget={budget} bytes: the schedule keeps {needs.lane} bytes of state for one sample, and a call of "
            f"max_batch={max_batch} samples copies {max_batch * needs.call}: give at least {least}, a smaller "
            "max_batch, or a schedule that keeps less"
        )
    return lanes
