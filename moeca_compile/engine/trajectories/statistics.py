"""Computes `stats`: what the trajectories of a handle ran, and the memory held now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from moeca_compile.runtime.stats import Stats, StepRecord
from moeca_compile.schedule.output import OutputFacts

if TYPE_CHECKING:
    from moeca_compile.engine.handle_runtime import HandleRuntime


class Ran(Protocol):
    """What ran a model: a compiled handle, or a loaded package.

    Attributes:
        runtime: its programs and trajectories.
        parts: how many graphs a call runs that are no programs of `runtime`.
        uncached: why calls run uncached; "": they don't.
    """

    parts: int
    uncached: str

    @property
    def runtime(self) -> HandleRuntime: ...


def stats_of(states: Sequence[Ran]) -> Stats:
    """The statistics of one handle, or the sums over all handles of a model."""
    steps: list[StepRecord] = []
    earlier: list[tuple[StepRecord, ...]] = []
    seconds: dict[str, float] = {}
    warned = Counter[str]()
    unshared: dict[str, str] = {}
    state_bytes = hoisted_bytes = 0
    groups = dict.fromkeys(state.runtime.trajectories for state in states)  # two transformers may have one
    for group in groups:
        latest, history = group.latest.last_trajectory(), group.history.trajectories()
        steps += latest
        earlier += [tuple(records) for records in history if not latest or records[0] is not latest[0]]
        for _, graph in [pair for running in group.states() for pair in running.graphs()]:
            for stream in list(graph.streams.values()):
                hoisted_bytes += stream.hoisted.bytes
                state_bytes += sum(tensor.nbytes for tensor in list(stream.state.tensors) if tensor is not None)
    for runtime in [state.runtime for state in states]:
        with runtime.lock:
            programs = list(runtime.programs.values())
        warned |= runtime.warned.counts.copy()
        unshared |= runtime.sizes.refused
        for program in programs:
            for name, spent in list(program.compiler.seconds.items()):
                seconds[name] = seconds.get(name, 0.0) + spent
    if len(groups) > 1:
        steps.sort(key=lambda record: record.step)  # stable: calls of one handle stay in their order
    full = sum(record.full_macs for record in steps)
    fraction = sum(record.macs for record in steps) / full if full else 1.0
    graphs = sum(bool(state.runtime.programs) + state.parts for state in states)
    timed = next((state.runtime.schedule for state in states if state.runtime.schedule.timesteps), None)
    uncached = "\n".join(dict.fromkeys(state.uncached for state in states if state.uncached))
    return Stats(
        steps=tuple(steps),
        state_bytes=state_bytes,
        mac_fraction=fraction,
        graphs=graphs,
        compile_seconds=seconds,
        hoisted_bytes=hoisted_bytes,
        freed_bytes=sum(state.runtime.freed.bytes for state in states),
        warnings=dict(warned),
        uncached=uncached,
        unshared=unshared,
        trajectories=(*earlier, tuple(steps)) if steps else tuple(earlier),
        on_host=all(state.runtime.on_host for state in states),
        timesteps=() if timed is None else timed.timesteps,
        searched_timesteps=timed is not None and timed.searched_timesteps,
        output_weights=next(filter(None, (_weights(state) for state in states)), None),
    )


def _weights(state: Ran) -> OutputFacts | None:
    """Of the schedule that a handle runs."""
    schedule = state.runtime.schedule
    return OutputFacts.of(schedule.output, schedule.rows)
