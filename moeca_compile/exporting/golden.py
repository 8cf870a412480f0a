"""Golden steps: what torch makes of a schedule's first steps, for every machine to compare with.

A step that computes everything gives what the user's own model gives, called as it is: neither the capture nor the
rewritten expert dispatch vouches for itself. Cached steps run the variants, node by node. Where the model's output is
cached, every output that is kept is the user's own model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from moeca_compile.dtypes import name_of
from moeca_compile.engine.step import run_step
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.engine.trajectory_state import TrajectoryState
from moeca_compile.errors import LoweringError, warn
from moeca_compile.exporting import request
from moeca_compile.exporting.request import Captured
from moeca_compile.graph.variant import SLOTS
from moeca_compile.runtime.bundle.verify import relative_error
from moeca_compile.runtime.state import StreamState
from moeca_compile.schedule.action import Action
from moeca_compile.schedule.adaptive import Adaptive

TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
NOISE = 0.1  # that latents differ by from step to step, where nothing else is known
MOST_ADAPTIVE = 24  # golden steps after an adaptive schedule's warm-up
WRONG = 100  # times the tolerance: no rounding, and no expert that flipped on a near-tie, gives that
Step = tuple[list[torch.Tensor], list[torch.Tensor]]


def golden_steps(captured: Captured, model: torch.nn.Module) -> list[Step]:
    """Inputs and outputs of the first steps of one trajectory: as many as it takes to run every variant once, and
    those that forecast with a history to forecast from.

    `model` is the one captured. Latent and timestep move as a sampler would move them, by seeded noise.

    Raises:
        LoweringError: the captured graph computes something else than the model.
    """
    program = captured.program
    schedule = program.schedule
    trajectory = Trajectory([], stream="golden")
    compiled, running = program.compiled_schedule, TrajectoryState(trajectory)
    arguments = [i for i, entry in enumerate(captured.inputs) if entry.name in captured.places]
    steps: list[Step] = []
    names = [program.variant(row).name for row in schedule.rows] if schedule.adaptive is not None else []
    missing = set(schedule.distinct_rows())
    generator, noise = torch.Generator().manual_seed(0), NOISE
    most = len(schedule.rows) + len(SLOTS) * schedule.period
    if schedule.adaptive is not None:
        most = schedule.adaptive.warmup + MOST_ADAPTIVE
    with torch.no_grad():
        while missing and len(steps) < most:
            index = len(steps)
            states = [stream.state for stream in running.of(compiled).streams.values()]
            if schedule.adaptive is not None:
                noise = _noise(schedule.adaptive, noise, states)
            args = _arguments(captured, index, generator, states, noise)
            has_history = any(
                min(depth, len(history)) > 1
                for state in states
                for depth, history in zip(state.depths, state.history, strict=True)
            )
            outputs = run_step(compiled, running, args, trajectory)
            if schedule.adaptive is None:
                at = schedule.row_index(index, schedule.timesteps[index] if schedule.timesteps else None)
            else:
                at = names.index(running.records[-1].variant)
            row = schedule.rows[at or 0]
            if has_history or not program.variant(row).wants_coefficients:
                missing.discard(row)
            results = [output for output in outputs if isinstance(output, torch.Tensor)]
            if program is captured.network and all(action is Action.COMPUTE for action in row):
                results = _eager(captured, model, args, results)
            steps.append(([args[i] for i in arguments], results))
    if missing and schedule.adaptive is not None:
        unseen = sorted(program.variant(row).name for row in missing)
        warn(
            f"no golden step runs {', '.join(unseen)}: in {len(steps)} steps the drift never chose their rows, so "
            "these variants aren't compared with torch. Check that a sampler reaches the schedule's thresholds",
        )
    return steps


def _noise(adaptive: Adaptive, noise: float, states: Sequence[StreamState]) -> float:
    """Noise for the next latent that lets the drift pass the thresholds one by one: steps of half of the smallest
    distance between them. In proportion to what the last step's noise gave."""
    thresholds = (*adaptive.thresholds, 0.0)
    wanted = min(upper - lower for upper, lower in itertools.pairwise(thresholds)) / 2
    drift = states[0].drift() if states else None
    return noise if not drift else min(NOISE, noise * wanted / drift)


def _eager(
    captured: Captured, model: torch.nn.Module, args: Sequence[Any], results: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What the model gives for these arguments of its graph, which gave `results`."""
    expected = request.call_with(model, captured, args)
    for (name, _), mine, expected_value in zip(captured.results, results, expected, strict=True):
        error = relative_error(mine.double().numpy(), expected_value.double().numpy())
        limit = WRONG * TOLERANCE.get(name_of(expected_value.dtype), 1.0)
        if not error <= limit:
            raise LoweringError(
                f"the captured graph gives another {name} than the model itself, by {error:.1e} of the largest value. "
                "Take off hooks and adapters (merge them into the weights), prepare the model again, and if the figure "
                "stays please report it"
            )
    return expected


def _arguments(
    captured: Captured, step: int, generator: torch.Generator, states: Sequence[StreamState], scale: float
) -> list[Any]:  # fmt: skip
    program, args = captured.program, list(captured.args)
    latent = program.latent if program.latent is not None else _largest(captured)
    if latent is not None:
        noise = torch.randn(args[latent].shape, generator=generator).to(args[latent].dtype)
        args[latent] = args[latent] + scale * noise
        if states and states[0].expected is not None:  # the schedule knows where its sampler goes from here
            after = states[0].expected[0]
            args[latent] = after.repeat(len(args[latent]) // len(after), *[1] * (after.dim() - 1)).to(noise.dtype)
    if program.timestep is not None:
        args[program.timestep] = _time(args[program.timestep], step, program.schedule.timesteps)
    return args


def _time(example: torch.Tensor, step: int, timesteps: Sequence[float]) -> torch.Tensor:
    if timesteps:
        return torch.full_like(example, timesteps[step])
    first = example.reshape(-1)[:1].expand(example.numel()).reshape(example.shape)  # one timestep for the batch
    return first - step if not example.is_floating_point() else first * (1 - 0.02 * step)


def _largest(captured: Captured) -> int | None:
    """The position of the floating input with the most dimensions, where no latent was found."""
    positions = [i for i, entry in enumerate(captured.inputs) if entry.name in captured.places]
    floating = [i for i in positions if captured.args[i].is_floating_point()]
    return max(floating, key=lambda i: captured.args[i].dim(), default=None)
