"""Milliseconds of each row kind, measured side by side on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from moeca_compile.planner.rollout import Call, Enough, SampledModel
from moeca_compile.planner.search.cost import Costs
from moeca_compile.planner.search.predict import Predictor
from moeca_compile.planner.search.rows import row_of

ROUNDS = 7


def costs(sampled: SampledModel, letters: str, predictors: Sequence[Predictor], seed: int, timed: bool) -> Costs:
    """MACs of each row kind, and bytes of state of each predictor; milliseconds too if `timed`."""
    program = sampled.program
    rows = {letter: row_of(sampled.kinds[letter], order=1) for letter in letters}
    every = sum(slot.bytes for slot in program.layout)
    once = sum(slot.bytes for slot in program.layout if slot.slot == "y0")
    return Costs(
        macs={letter: float(program.variant(row).macs) for letter, row in rows.items()},
        ms=_milliseconds(sampled, letters, seed) if timed else {},
        state_bytes={p.name: every if sampled.by_branches else once * p.terms for p in predictors},
    )


def _milliseconds(sampled: SampledModel, letters: str, seed: int) -> dict[str, float]:
    """The fastest of interleaved runs in the middle of a trajectory, where every row has the state that it reads.

    The fastest: what a busy machine adds isn't the row's.
    """
    program = sampled.program
    taken: dict[str, list[float]] = {letter: [] for letter in letters}
    warm: set[str] = set()

    def watch(call: Call) -> None:
        if call.program is not program or call.state is None or call.state.last_step < 2:
            return
        for letter in letters:
            variants = call.compiled.variants
            variant = variants.variant(row_of(sampled.kinds[letter], order=1))
            arguments = call.compiled.arguments(variant, call.args, call.state, call.state.last_step + 1)
            run = variants.compile(variant, arguments)
            if letter not in warm:
                run(arguments)  # the first run of a compiled program isn't typical
                warm.add(letter)
            begin = time.perf_counter()
            run(arguments)
            taken[letter].append((time.perf_counter() - begin) * 1e3)
        if len(taken[letters[0]]) >= ROUNDS:
            raise Enough

    with suppress(Enough):
        sampled.run(seed, watch=watch)
    return {letter: min(times) for letter, times in taken.items() if times}
