"""Milliseconds of each row kind, measured side by side on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from moeca_compile.engine.step import arguments_for
from moeca_compile.planner.handle import Call, Enough, Handle
from moeca_compile.planner.search.cost import Costs
from moeca_compile.planner.search.predict import Predictor
from moeca_compile.planner.search.rows import row_of

ROUNDS = 7


def costs(handle: Handle, letters: str, predictors: Sequence[Predictor], seed: int, timed: bool) -> Costs:
    """MACs of each row kind, and bytes of state of each predictor; milliseconds too if `timed`."""
    program = handle.program
    rows = {letter: row_of(handle.kinds[letter], order=1) for letter in letters}
    every = sum(slot.bytes for slot in program.layout)
    once = sum(slot.bytes for slot in program.layout if slot.slot == "y0")
    return Costs(
        macs={letter: float(program.variant(row).macs) for letter, row in rows.items()},
        ms=_milliseconds(handle, letters, seed) if timed else {},
        state_bytes={one.name: every if handle.by_branches else once * one.keeps for one in predictors},
    )


def _milliseconds(handle: Handle, letters: str, seed: int) -> dict[str, float]:
    """The fastest of interleaved runs in the middle of a trajectory, where every row has the state that it reads.

    The fastest: what a busy machine adds isn't the row's.
    """
    program = handle.program
    taken: dict[str, list[float]] = {letter: [] for letter in letters}
    warm: set[str] = set()

    def watch(call: Call) -> None:
        if call.program is not program or call.state is None or call.state.last_step < 2:
            return
        for letter in letters:
            variant = program.variant(row_of(handle.kinds[letter], order=1))
            arguments = arguments_for(program, call.track, variant, call.args, call.state, call.state.last_step + 1)
            run = program.compile(variant, arguments)
            if letter not in warm:
                run(arguments)  # the first run of a compiled program isn't typical
                warm.add(letter)
            begin = time.perf_counter()
            run(arguments)
            taken[letter].append((time.perf_counter() - begin) * 1e3)
        if len(taken[letters[0]]) >= ROUNDS:
            raise Enough

    with suppress(Enough):
        handle.run(seed, watch=watch)
    return {letter: min(times) for letter, times in taken.items() if times}
