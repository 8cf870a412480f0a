"""One call of a compiled model: find its step, row and state, run the variant, and commit what it wrote."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.engine.hoisted import Hoisted
from moeca_compile.engine.trajectories.timesteps import StepKey, uniform_timesteps
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.engine.trajectory_state import GraphState, Stream, TrajectoryState
from moeca_compile.errors import StateError
from moeca_compile.graph.content import needs_device_sync
from moeca_compile.graph.nowait import Flag
from moeca_compile.graph.variant import Variant
from moeca_compile.runtime.clock import CallObservation
from moeca_compile.runtime.stats import StepRecord


def refuse_gradients(values: Iterable[Any]) -> None:
    """Refuse a call that would be recorded for gradients. Call it where grad mode is on.

    Raises:
        StateError: one of the values is a tensor that requires grad.
    """
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
        raise StateError(
            "moeca is for inference: grad mode is on and some tensors require grad. Call the model under "
            "torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)"
        )


def run_step(
    compiled: CompiledSchedule,
    running: TrajectoryState,
    args: Sequence[Any],
    trajectory: Trajectory | None,
    at_start: Callable[[], None] | None = None,
) -> tuple[Any, ...]:
    """Run one call.

    Args:
        compiled: the schedule for the call's graph.
        running: the state of `trajectory`; it is advanced.
        args: of the captured graph.
        trajectory: None: the call is in no trajectory.
        at_start: called if the call begins a trajectory, or fits no stream.

    Returns:
        The graph's outputs.

    Raises:
        StateError: two threads share `running`, or a trajectory got more calls than it declared.
    """
    if not running.lock.acquire(blocking=False):
        raise StateError(
            "this compiled model is running in another thread with the same state: give each thread's sampling loop "
            "its own `with moeca_compile.trajectory(model): ...`"
        )
    try:
        return _run(compiled, running, args, trajectory, at_start)
    finally:
        running.lock.release()


def _run(
    compiled: CompiledSchedule,
    running: TrajectoryState,
    args: Sequence[Any],
    trajectory: Trajectory | None,
    at_start: Callable[[], None] | None,
) -> tuple[Any, ...]:
    begin = time.perf_counter()
    program, driver, variants = compiled.program, compiled.driver, compiled.variants
    compiler = program.compiler
    graph = running.by_schedule.get(compiled) or running.of(compiled)
    if running.counts and not compiled.schedule.timesteps:
        observation = CallObservation(None, kind=graph.kind)  # the counter needs no input
    else:
        observation = _observe(compiled, running, graph, args)
    placement = running.clock.observe(observation)
    step = placement.step
    if at_start is not None and (placement.restart or placement.stream is None):
        at_start()
    if placement.restart:
        declared = trajectory.timesteps if trajectory is not None else ()
        expected = () if program.more_timesteps else declared or compiled.schedule.timesteps
        running.begin(placement, observation, expected)
    if placement.warning and compiled.layout:  # without state nothing is lost
        program.warned.once(placement.warning)
    if trajectory is not None and trajectory.steps is not None:
        driver.refuse_surplus(step, trajectory.steps, trajectory.stream or "")
    stream = None
    if placement.stream is not None:
        stream = graph.streams.get(placement.stream) or running.stream(compiled, graph, placement.stream, step)
        if len(running.by_schedule) > 1:
            running.drop_useless(step)
    elif observation.trouble:
        running.forget()  # the call's step isn't known, so the state may be of an older step than the last
    contents: dict[int, Hashable] = {}
    if observation.condition:
        contents = dict(zip(program.condition, observation.condition, strict=True))
    elif stream is not None and stream.hoisted.inputs:
        contents = _likely_contents(compiled, running, stream, args)
    state = None if stream is None else stream.state
    timestep = None if observation.by_sample else observation.timestep
    row, cold = driver.choose(state, step, timestep, observation.eps)
    start, compiled_before = time.perf_counter(), compiler.spent
    variant = variants.built.get(row) or variants.variant(row)
    hoisted: Sequence[torch.Tensor] = ()
    if stream is None:
        hoisted = Hoisted().of(program.prologues, variant.hoists, args, None)
    elif row == driver.full and (trajectory is None or trajectory.frozen is None):
        _start_cold_if_weights_changed(graph, stream, args)
    if stream is not None and variant.hoists:
        key: Any = observation.timestep if observation.key is None else observation.key
        if running.counts and not compiled.schedule.timesteps:
            key = _timesteps_of_counted(compiled, running, step, args)
        if key is not None:
            running.timestep_plan.visit(key)
        hoisted = stream.hoisted.of(program.prologues, variant.hoists, args, key, contents)
    compiling = compiler.spent - compiled_before
    begin, hoisting = begin + compiling, time.perf_counter() - start - compiling
    graph_args = args if program.freeing is None else program.freeing.arguments(variant.takes, args)
    arguments = compiled.arguments(variant, graph_args, state, step, hoisted)
    run = variants.executables.get(row)
    if run is None:
        compile_start = time.perf_counter()
        run = variants.compile(variant, arguments)
        run(_apart(variant, arguments))  # a first run is slower than later ones: it isn't timed
        begin += time.perf_counter() - compile_start
    with compiler.replaying:  # a replay's results are committed before another replay overwrites them
        start = time.perf_counter()
        try:
            results = run(arguments)
        except BaseException:
            if variant.changes and state is not None:
                state.clear()  # half of it may be changed: the next call starts cold
            raise
        end = time.perf_counter()
        outputs = tuple(results[: variant.outputs])
        if program.caches:
            outputs = _with_caches_written(program.caches, args, outputs)
        if state is not None:
            finite: bool | Flag = True
            if variant.writes or variant.changes:
                finite = is_finite(results[0])
            written = results[variant.outputs :]
            driver.keep(state, step, row, variant.writes, written, finite, bool(variant.changes))
    if program.freeing is not None and stream is not None:
        program.freeing.after_call(compiled, [other.hoisted for other in graph.streams.values()], args, step)
    full = variants.built.get(driver.full) or variants.variant(driver.full)
    ms = (end - start + hoisting) * 1e3
    overhead = (time.perf_counter() - begin) * 1e3 - ms
    running.records.append(
        StepRecord(
            step, str(placement.stream), variant.name, ms, overhead, variant.macs, cold, 0, full.macs,
            observation.timestep,
        )
    )  # fmt: skip
    return outputs


def _with_caches_written(caches: Sequence[int], args: Sequence[Any], results: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the new values of caches, which follow the model's own results, into the caller's tensors.

    Args:
        caches: positions of the caches among `args`.
        args: of the call.
        results: of the graph.

    Returns:
        The model's own results.
    """
    count = len(results) - len(caches)
    for position, value in zip(caches, results[count:], strict=True):
        if value is not args[position]:
            args[position].copy_(value)
    return results[:count]


def _apart(variant: Variant, arguments: Sequence[Any]) -> list[Any]:
    """The arguments with copies of those that the variant changes in place."""
    first = len(variant.takes) + len(variant.hoists)
    changed = {first + number for number, slot in enumerate(variant.reads) if slot in variant.changes}
    return [one.clone() if number in changed else one for number, one in enumerate(arguments)]


def is_finite(output: Any) -> bool | Flag:
    """Whether the model's output is finite; on an accelerator a flag that is read later."""
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return True
    if needs_device_sync(output):
        return Flag(torch.isfinite(output).all())
    # the sum of finite numbers may overflow, but that of others is never finite; a sum is ten times as fast
    return math.isfinite(output.sum()) or bool(torch.isfinite(output).all())


def _observe(
    compiled: CompiledSchedule, running: TrajectoryState, graph: GraphState, args: Sequence[Any]
) -> CallObservation:
    """Read what the clock needs from the call's inputs."""
    program = compiled.program
    timestep = None if program.timestep is None else args[program.timestep]
    more = [*map(args.__getitem__, program.more_timesteps)]
    if running.counts:
        return running.probe.observe(timestep, None, (), graph.kind, more)
    latent = None if program.latent is None else args[program.latent]
    kind: Hashable = graph.kind_with(args[program.caches[0]].data_ptr()) if program.caches else graph.kind
    return running.probe.observe(timestep, latent, [*map(args.__getitem__, program.condition)], kind, more)


def _likely_contents(
    compiled: CompiledSchedule, running: TrajectoryState, stream: Stream, args: Sequence[Any]
) -> dict[int, Hashable]:
    """By position, numbers for the contents of the inputs that hoisted values came from.

    In a named stream the host doesn't wait for an accelerator. So a write past an input's version counter is noticed
    some calls later; then the stream's state is dropped.
    """
    contents = dict[int, Hashable]()
    for i in stream.hoisted.inputs:
        contents[i], was_wrong = running.probe.contents.likely_number(args[i])
        if was_wrong:
            stream.state.clear()
            compiled.program.warned.once(
                "an input was written to past its version counter (.data, DLPack, a kernel of its own). A named stream "
                "doesn't wait for the device to tell, so at least one call used the old values; this one starts cold. "
                "Write with copy_, or pass another tensor"
            )
    return contents


def _start_cold_if_weights_changed(graph: GraphState, stream: Stream, args: Sequence[Any]) -> None:
    """Drop the state of all streams if weights that hoisted values came from were written past their version
    counters."""
    if stream.hoisted.weights_changed(args):
        for name, other in list(graph.streams.items()):
            other.state.clear()
            if other is not stream:
                del graph.streams[name]


def _timesteps_of_counted(
    compiled: CompiledSchedule, running: TrajectoryState, step: int, args: Sequence[Any]
) -> StepKey | None:
    """What identifies the timesteps of a call in a named stream: read where the host needn't wait for them, else as
    declared."""
    values = [args[position] for position in compiled.program.prologues.timesteps]
    if running.declared is not None and len(values) == 1 and values[0].dim() < 2 and needs_device_sync(values[0]):
        return running.declared.at(step, values[0])
    return uniform_timesteps(values)
