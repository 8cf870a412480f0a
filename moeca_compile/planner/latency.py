"""The costs of each row kind: MACs, bytes of state and, measured on this machine, milliseconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from moeca_compile.planner.rollout import Call, SampledModel, StopRun
from moeca_compile.planner.search.cost import Costs
from moeca_compile.planner.search.predict import Predictor
from moeca_compile.planner.search.rows import row_of

ROUNDS = 7  # timed runs of each row kind


def costs(sampled: SampledModel, letters: str, predictors: Sequence[Predictor], seed: int, timed: bool) -> Costs:
    """MACs of each row kind and bytes of state of each predictor.

    Args:
        sampled: the model.
        letters: the row kinds.
        predictors: that plans may use.
        seed: of the trajectory in which rows are timed.
        timed: measure milliseconds too.

    Returns:
        The costs.
    """
    program = sampled.program
    rows = {letter: row_of(sampled.kinds[letter], order=1) for letter in letters}
    total_bytes = sum(slot.bytes for slot in program.layout)
    bytes_per_term = sum(slot.bytes for slot in program.layout if slot.slot == "y0")
    state_bytes = {p.name: total_bytes if sampled.caches_branches else bytes_per_term * p.terms for p in predictors}
    return Costs(
        macs={letter: float(program.variant(row).macs) for letter, row in rows.items()},
        ms=_milliseconds(sampled, letters, seed) if timed else {},
        state_bytes=state_bytes,
    )


def _milliseconds(sampled: SampledModel, letters: str, seed: int) -> dict[str, float]:
    """The least time of each row kind, from interleaved runs in a trajectory at steps where all state exists.

    The least time is used because other processes on the machine only add to it.
    """
    program = sampled.program
    milliseconds: dict[str, list[float]] = {letter: [] for letter in letters}
    warmed_up: set[str] = set()

    def watch(call: Call) -> None:
        if call.program is not program or call.state is None or call.state.last_step < 2:
            return
        for letter in letters:
            variants = call.compiled.variants
            variant = variants.variant(row_of(sampled.kinds[letter], order=1))
            arguments = call.compiled.arguments(variant, call.args, call.state, call.state.last_step + 1)
            run = variants.compile(variant, arguments)
            if letter not in warmed_up:
                run(arguments)  # the first run of a compiled program is slower
                warmed_up.add(letter)
            begin = time.perf_counter()
            run(arguments)
            milliseconds[letter].append((time.perf_counter() - begin) * 1e3)
        if len(milliseconds[letters[0]]) >= ROUNDS:
            raise StopRun

    with suppress(StopRun):
        sampled.run(seed, watch=watch)
    return {letter: min(times) for letter, times in milliseconds.items() if times}
