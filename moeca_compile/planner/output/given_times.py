"""Runs of a sampler at timesteps that it is given, and whether it makes its steps there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.output.paths import Path, path_with, sampling_with
from moeca_compile.planner.rollout import TIMESTEPS, Call, SampledModel, StopRun

PROBED = 3  # steps that a sampler makes to show that it takes timesteps
SHIFT = 0.5  # of the way to the next step: how far the probe moves a step
NEAR = 0.1  # of the way to the nearest step: a timestep that comes so near is the given one
ROUNDING = 2.0**-8  # relative; a model may receive its timesteps in bfloat16


def path_at(sampled: SampledModel, seed: int, sampler: Callable[..., Tensor], timesteps: Sequence[float]) -> Path:
    """The uncached path of a sampler at given timesteps.

    Args:
        sampled: the compiled model.
        seed: passed to the sampler.
        sampler: takes `timesteps`.
        timesteps: one a step, as the model receives them; strictly falling or rising.

    Raises:
        ScheduleError: the sampler made its steps elsewhere.
    """
    path = path_with(sampled, seed, sampler, **{TIMESTEPS: list(timesteps)})
    _check(timesteps, path.timesteps)
    return path


def check_taken(sampled: SampledModel, seed: int, sampler: Callable[..., Tensor], own: Sequence[float]) -> None:
    """Refuse a sampler that ignores the timesteps that it is given; it makes a few steps to show.

    Args:
        sampled: the compiled model.
        seed: passed to the sampler.
        sampler: takes `timesteps`.
        own: its own ones.

    Raises:
        ScheduleError: the sampler made its steps elsewhere.
    """
    moves = [after - before for before, after in itertools.pairwise(own)]
    given = [own[0], *(time + SHIFT * move for time, move in zip(own[1:], [*moves[1:], moves[-1]], strict=True))]
    came: list[float | None] = []

    def watch(call: Call) -> None:
        if call.record.step == len(came):
            came.append(call.timestep)
        if len(came) == PROBED:
            raise StopRun

    with sampling_with(sampled, sampler, **{TIMESTEPS: given}), suppress(StopRun):
        sampled.run(seed, watch=watch)
    _check(given[:PROBED], came)


def _check(given: Sequence[float], came: Sequence[float | None]) -> None:
    gaps = [abs(after - before) for before, after in itertools.pairwise(given)]
    wrong = "" if len(came) == len(given) else f"it made {len(came)} steps"
    for step, (time, received) in enumerate(zip(given, came, strict=False)):
        tolerance = max(NEAR * min(gaps[max(step - 1, 0) : step + 1]), ROUNDING * abs(time))
        if not wrong and not (received is not None and abs(received - time) <= tolerance):
            wrong = f"step {step} is to be at {time:g}, and the model received {received}"
    if wrong:
        raise ScheduleError(
            f"calibrate: sample takes timesteps, and was given {len(given)} of them, but made its steps elsewhere: "
            f"{wrong}. It must call the model once at each of them, in the unit that the model receives; or leave the "
            "keyword out, and where the steps lie isn't searched"
        )
