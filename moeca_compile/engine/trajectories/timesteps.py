"""Several timesteps in one call: one for each token, one for each sample, or several inputs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeca_compile.graph.content import needs_device_sync

UP_AND_DOWN = (
    "timesteps of one call moved up and down at once since the last call, so no step of one trajectory comes next: "
    "computed in full, nothing kept. If these are calls of one trajectory all the same, name it: "
    "moeca_compile.trajectory(model, steps, stream=...)"
)
NOT_A_NUMBER = "a timestep is NaN: computed in full, nothing kept. Pass the sampler's timestep to cache"
# of the dtypes in which neighboring timesteps of a sampler may become one
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}


@dataclass(frozen=True, slots=True)
class VariedTimesteps:
    """Identifies the timesteps of a call in which an input holds more than one.

    Attributes:
        contents: a number for the contents of each timestep input.
    """

    contents: tuple[Hashable, ...]


# What values of a step are stored under: the timestep, one timestep for each input, or contents.
StepKey = float | tuple[float, ...] | VariedTimesteps


class SeveralTimesteps(NamedTuple):
    """Several timesteps of a call as the clock takes them.

    Attributes:
        timestep: the middle one of the first input; of two the larger.
        position: the sum of the inputs' means. It moves with every timestep. NaN: a timestep is NaN.
        values: all timesteps, float64.
        moves_both_ways: some timesteps rose and some fell since the last call.
        by_sample: the samples of the batch have different timesteps.
        uniform: one timestep for each input; None: an input holds several.
    """

    timestep: float
    position: float
    values: Tensor
    moves_both_ways: bool
    by_sample: bool
    uniform: StepKey | None


def read_several(inputs: Sequence[Tensor], latent: Tensor | None, before: Tensor | float | None) -> SeveralTimesteps:
    """Read the timesteps of a call; waits for an accelerator.

    Args:
        inputs: the timestep inputs, the one that schedules go by first.
        latent: of the call; None: not known.
        before: `values` of the last such call, or its one timestep; None: there was none.
    """
    device = inputs[0].device
    flat = [value.detach().reshape(-1).double().to(device) for value in inputs]
    values = torch.cat(flat)
    change = torch.zeros_like(values) if before is None else values - before
    numbers = [
        flat[0].sort().values[flat[0].numel() // 2],
        torch.stack([part.mean() for part in flat]).sum(),
        change.amin(),
        change.amax(),
        torch.stack([_differs_by_sample(value, latent).to(device) for value in inputs]).any().double(),
    ]
    for part in flat:
        numbers += part.aminmax()
    middle, position, fall, rise, by_sample, *limits = torch.stack(numbers).tolist()
    lows, highs = limits[::2], limits[1::2]
    uniform = key_of(lows) if lows == highs else None
    return SeveralTimesteps(middle, position, values, fall < 0 < rise, bool(by_sample), uniform)


def key_of(timesteps: Sequence[float]) -> StepKey | None:
    """The key of a call with one timestep for each input; None: there is no timestep input."""
    return timesteps[0] if len(timesteps) == 1 else tuple(timesteps) or None


def _differs_by_sample(value: Tensor, latent: Tensor | None) -> Tensor:
    """Whether rows of a timestep input differ, a bool tensor. A vector has one timestep for each sample if its length
    is the batch; otherwise its elements are used by all samples."""
    is_by_sample = value.dim() > 1 or (value.dim() == 1 and (latent is None or len(value) == len(latent)))
    if not is_by_sample:
        return torch.zeros((), dtype=torch.bool, device=value.device)
    return (value != value[:1]).any()


def uniform_timesteps(inputs: Sequence[Any]) -> StepKey | None:
    """The timestep of a call, or a tuple of one for each input. None: an input holds several, or reading it would wait
    for a device."""
    numbers = []
    for value in inputs:
        if not isinstance(value, Tensor) or needs_device_sync(value) or not value.numel():
            return None
        low, high = value.detach().double().aminmax()
        if low != high:
            return None
        numbers.append(float(low))
    return key_of(numbers)
