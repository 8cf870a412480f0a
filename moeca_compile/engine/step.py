"""One call of a compiled model: which step, which row, which state; run the variant; keep what it wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from moeca_compile.engine.declared_timesteps import DeclaredTimesteps
from moeca_compile.engine.hoisted import Hoisted, uniform_timestep
from moeca_compile.engine.tracks import MAX_RECORDS, Finite, Runnable, Track, Tracks
from moeca_compile.engine.trajectory import Trajectory
from moeca_compile.errors import StateError
from moeca_compile.graph.nowait import needs_device_sync
from moeca_compile.graph.variant import Variant
from moeca_compile.runtime.clock import CallObservation, Counter, StepPlacement
from moeca_compile.runtime.rows import choose_row
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.stats import StepRecord
from moeca_compile.schedule import Row


def run_step(
    program: Runnable,
    tracks: Tracks,
    args: Sequence[Any],
    trajectory: Trajectory | None,
    at_start: Callable[[], None] = lambda: None,
) -> tuple[Any, ...]:
    """Run one call; `at_start` is called where it begins a trajectory, or belongs to none that is known.

    Raises:
        StateError: two threads share these tracks, or a trajectory got more calls than it declared.
    """
    if not tracks.lock.acquire(blocking=False):
        raise StateError(
            "this compiled model is running in another thread with the same state: give each thread's sampling loop "
            "its own `with moeca_compile.trajectory(model): ...`"
        )
    try:
        return _run(program, tracks, args, trajectory, at_start)
    finally:
        tracks.lock.release()


def _run(
    program: Runnable,
    tracks: Tracks,
    args: Sequence[Any],
    trajectory: Trajectory | None,
    at_start: Callable[[], None],
) -> tuple[Any, ...]:
    begin = time.perf_counter()
    track = tracks.of(program)
    observation = _look(program, tracks, track, args)
    placement = tracks.clock.observe(observation)
    if placement.restart or placement.stream is None:
        at_start()
    if placement.restart:
        declared = trajectory.timesteps if trajectory is not None else ()
        tracks.begin(placement, observation, declared or program.schedule.timesteps)
    if placement.warning and program.layout:  # without state nothing is lost
        program.warned.once(placement.warning)
    if trajectory is not None and trajectory.steps is not None and placement.step >= trajectory.steps:
        raise StateError(
            f"the trajectory was declared with steps={trajectory.steps}, and this is call {placement.step + 1}"
            f"{' of stream ' + repr(trajectory.stream) if trajectory.stream else ''}: start a new trajectory"
        )
    if placement.stream is None and observation.timestep is None:
        tracks.forget()  # nobody knows how far the trajectory went with this call
    state = None
    if placement.stream is not None:
        if placement.stream not in track.states:
            track.states[placement.stream] = program.state()
        state = track.states[placement.stream]
        _drop_if_not_finite(program, track, placement.stream, state)
    contents = _contents(program, tracks, track, placement, observation, args)
    row, cold = _row(program, placement, observation, state)
    variant, run = program.executable(row)
    start, compiled = time.perf_counter(), sum(program.compile_seconds.values())
    if row == program.schedule.rows[0] and (trajectory is None or trajectory.frozen is None):
        _start_cold_if_weights_changed(track, placement, args)
    hoisted = _hoisted(program, tracks, placement, observation, variant, args, contents)
    compiling = sum(program.compile_seconds.values()) - compiled
    begin, sharing = begin + compiling, time.perf_counter() - start - compiling
    arguments = arguments_for(program, track, variant, args, state, placement.step, hoisted)
    if run is None:
        outside = time.perf_counter()
        run = program.compile(variant, arguments)
        run(arguments)  # the first run of a compiled program isn't typical: it isn't timed
        begin += time.perf_counter() - outside
    with program.replaying:  # what a recording gave is kept before another replay writes over it
        start = time.perf_counter()
        results = run(arguments)
        end = time.perf_counter()
        outputs = tuple(results[: variant.outputs])
        if state is not None:
            _keep(program, track, placement, state, row, variant, results)
    if len(tracks.records) == MAX_RECORDS:
        del tracks.records[: MAX_RECORDS // 2]
    ms = (end - start + sharing) * 1e3
    overhead = (time.perf_counter() - begin) * 1e3 - ms
    stream, macs = str(placement.stream), program.full_macs
    tracks.records.append(
        StepRecord(
            placement.step, stream, variant.name, ms, overhead, variant.macs, cold, 0, macs, observation.timestep
        )
    )
    return outputs


def _keep(
    program: Runnable,
    track: Track,
    placement: StepPlacement,
    state: StreamState,
    row: Row,
    variant: Variant,
    results: Sequence[Any],
) -> None:
    """Take what a step wrote, unless the state that it came from turns out not to have been finite."""
    if variant.writes and _drop_if_not_finite(program, track, placement.stream, state, wait=True):
        return
    state.commit(placement.step, row, variant.writes, results[variant.outputs :])
    output = results[0]
    if variant.writes and isinstance(output, torch.Tensor) and output.is_floating_point():
        track.finite[placement.stream] = Finite(output, placement.step)


def _look(program: Runnable, tracks: Tracks, track: Track, args: Sequence[Any]) -> CallObservation:
    timestep = None if program.timestep is None else args[program.timestep]
    if isinstance(tracks.clock, Counter):
        if not program.schedule.timesteps:
            return CallObservation(None, kind=track.kind)  # nothing needs to be read
        return tracks.probe.look(timestep, None, (), track.kind)
    latent = None if program.latent is None else args[program.latent]
    return tracks.probe.look(timestep, latent, [args[i] for i in program.condition], track.kind)


def _row(
    program: Runnable, placement: StepPlacement, observation: CallObservation, state: StreamState | None
) -> tuple[Row, bool]:
    """The row to run, and whether a cold cache made it a full one against the schedule."""
    schedule = program.schedule
    if state is None:
        return schedule.rows[0], True
    choice = choose_row(schedule, placement.step, observation.timestep, state)
    if choice.warning:
        program.warned.once(choice.warning)
    if choice.cold:
        state.clear()
    return choice.row, choice.cold


def _contents(
    program: Runnable,
    tracks: Tracks,
    track: Track,
    placement: StepPlacement,
    observation: CallObservation,
    args: Sequence[Any],
) -> dict[int, Hashable]:
    """What tells the contents of inputs, by position: of those that the clock has seen, or that hoisted values came
    from. In a named stream nobody waits for an accelerator: what was written to there past its version counter is
    noticed late, and the state that came from it dropped then."""
    if observation.condition:
        return dict(zip(program.condition, observation.condition, strict=True))
    found = dict[int, Hashable]()
    for i in track.hoisted[placement.stream].inputs if placement.stream in track.hoisted else ():
        found[i], was_wrong = tracks.probe.contents.likely_number(args[i])
        if was_wrong:
            track.states[placement.stream].clear()
            program.warned.once(
                "an input was written to past its version counter (.data, DLPack, a kernel of its own). A named stream "
                "doesn't wait for the device to tell, so at least one call used the old values; this one starts cold. "
                "Write with copy_, or pass another tensor"
            )
    return found


def _start_cold_if_weights_changed(track: Track, placement: StepPlacement, args: Sequence[Any]) -> None:
    """Weights that were written to past their version counters, among those that hoisted values came from."""
    kept = track.hoisted.get(placement.stream)
    if kept is not None and kept.weights_changed(args):
        track.hoisted = {placement.stream: kept}
        for state in track.states.values():
            state.clear()


def _hoisted(
    program: Runnable, tracks: Tracks, placement: StepPlacement, observation: CallObservation, variant: Variant,
    args: Sequence[Any], contents: dict[int, Hashable],
) -> list[torch.Tensor]:  # fmt: skip
    if not variant.hoists:
        return []
    track, stream, timestep = tracks.of(program), placement.stream, observation.timestep
    if isinstance(tracks.clock, Counter) and not program.schedule.timesteps:  # there the sighting saw nothing
        timestep = _unseen(program, tracks.told, placement.step, args)
    if stream is None:
        return Hoisted().of(program.prologues, variant.hoists, args, None)
    if timestep is not None:
        tracks.walk(timestep)
    if stream not in track.hoisted:
        track.hoisted[stream] = Hoisted(tracks.ahead)

    def content(i: int) -> Hashable:
        return contents[i] if i in contents else tracks.probe.contents.number(args[i])

    return track.hoisted[stream].of(program.prologues, variant.hoists, args, timestep, content)


def _unseen(program: Runnable, told: DeclaredTimesteps | None, step: int, args: Sequence[Any]) -> float | None:
    """The timestep of a call whose inputs nobody waits for: read where that costs nothing, else as it was told."""
    if program.timestep is None:
        return None
    value = args[program.timestep]
    return told.at(step, value) if told is not None and needs_device_sync(value) else uniform_timestep(value)


def arguments_for(
    program: Runnable,
    track: Track,
    variant: Variant,
    args: Sequence[Any],
    state: StreamState | None,
    step: int,
    hoisted: Sequence[torch.Tensor] | None = None,
) -> list[Any]:
    """What `variant` takes for a call with `args` at `step`: inputs, hoisted values (None: computed for it), state
    (zeros where unwritten), coefficients."""
    if hoisted is None:
        hoisted = Hoisted().of(program.prologues, variant.hoists, args, None)
    kept = [None if state is None else state.tensors[slot] for slot in variant.reads]
    read = [program.zeros(slot) if one is None else one for slot, one in zip(variant.reads, kept, strict=True)]
    arguments = [*[args[i] for i in variant.takes], *hoisted, *read]
    device = program.layout[0].device if program.layout else ""
    if variant.wants_now:
        arguments.append(track.table(float(step + 1), device))
    if variant.wants_coefficients:
        assert state is not None  # without state every row is full, and a full row forecasts nothing
        arguments.append(track.table(state.coefficients(step), device))
    return arguments


def _drop_if_not_finite(
    program: Runnable, track: Track, stream: Hashable, state: StreamState, wait: bool = False
) -> bool:
    """NaN must not live on in a cache: the last computed step's output is looked at as soon as it is there, and waited
    for (`wait`) before another step is kept. True: its state was dropped."""
    finite = track.finite.get(stream)
    if finite is None or not (wait or finite.ready()):
        return False
    del track.finite[stream]
    if finite.holds():
        return False
    state.clear()
    program.warned.once(
        f"step {finite.step} gave values that aren't finite: its state is dropped and the next step computed in full. "
        "If the model overflows, run it in bfloat16 or float32"
    )
    return True
