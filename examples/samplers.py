"""Samplers in numpy, for serving without torch: they call a `Model` and know nothing of caches.

A model is `model(x, t, condition) -> output`; `model_of` makes one of a session's trajectory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.trajectory import Trajectory

Model = Callable[[Any, float, Any], Any]


def model_of(trajectory: Trajectory, x: str = "x", t: str = "t", condition: str = "y", output: str = "") -> Model:
    """Make a model of a session's trajectory, for the samplers here.

    Args:
        trajectory: what `Session.trajectory` gave.
        x: the name of the latent input.
        t: the name of the timestep input. Where it is a vector, the time is repeated for each sample.
        condition: the name of the condition input.
        output: the name of the output; "": the first one.

    Returns:
        `model(x [N, ...], time, condition [N, ...]) -> output [N, ...]`; each call is the trajectory's next step.

    Raises:
        BundleError: a name that the bundle doesn't have.
    """
    specs = {spec.name: spec for spec in trajectory.session.inputs}
    result = output or trajectory.session.outputs[0].name
    names = {*specs, *(spec.name for spec in trajectory.session.outputs)}
    if unknown := {x, t, condition, result} - names:
        raise BundleError(f"the bundle has nothing named {sorted(unknown)}; it has {sorted(names)}")

    def model(latent: Any, time: float, given: Any) -> Any:
        sizes = () if not specs[t].shape else (len(latent),)
        times = np.full(sizes, time, np.dtype(specs[t].dtype))
        return trajectory.run({x: latent, t: times, condition: given})[result]

    return model


def guided(model: Model, null: Any, scale: float, unconditional: Model | None = None) -> Model:
    """Apply classifier-free guidance, `uncond + scale * (cond - uncond)` (Ho & Salimans 2022, arXiv 2207.12598).

    Args:
        model: the model to guide.
        null: the empty condition, shaped like a batch of conditions.
        scale: the guidance scale; 1 is the conditional model.
        unconditional: a model of another trajectory for the unconditional calls. None: one call with both halves in one
            batch, the conditional one first.

    Returns:
        A model that is called like `model`.
    """

    def both(x: Any, t: float, condition: Any) -> Any:
        if unconditional is not None:
            with_it, without = model(x, t, condition), unconditional(x, t, null)
        else:
            halves = model(np.concatenate([x, x]), t, np.concatenate([condition, null]))
            with_it, without = np.split(halves, 2)
        return without + np.asarray(scale, without.dtype) * (with_it - without)

    return both


def euler(
    model: Model, x: Any, condition: Any, times: Sequence[float], time_scale: float = 1.0, channels: int | None = None
) -> Any:
    """Integrate dx/dt = velocity by Euler's method, for a rectified flow (Liu et al. 2022, arXiv 2209.03003).

    Args:
        model: gives the velocity.
        x: the start, [N, C, ...].
        condition: what the model is called with, [N, ...].
        times: from the start to the end, one more than steps: 1 ... 0.
        time_scale: what the model multiplies a time with, such as 1000.
        channels: how many of the output's channels are velocity; None: all.

    Returns:
        The end, like `x`.
    """
    for now, after in itertools.pairwise(times):
        velocity = model(x, time_scale * now, condition)[:, :channels]
        x = x + np.asarray(after - now, x.dtype) * velocity
    return x
