"""How the final latents change with each weight of the computed steps, measured in one pass over an emulated run.

The sampler's update and the output rule are linear, so derivatives go through them as latents do. Only the model has to
be asked: what it returns for a latent that is moved a little. By then the latent has a derivative by each weight of
the steps before, dozens of them, but these are nearly dependent: they are sums of outputs that were alike. So at each
computed step, and for each sample by itself, the few directions that hold most of them are taken (a truncated singular
value decomposition), and the model is called once a direction. What lies outside these directions still moves the
latent, but is taken not to change what the model returns. Source of the decomposition: Eckart & Young, The
Approximation of One Matrix by Another of Lower Rank, Psychometrika 1 (1936).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeca_compile.planner.output.emulated import EmulatedSampler, Parts, State
from moeca_compile.planner.output.fit import Weights

DIRECTIONS = 6  # at each computed step, for each sample
CHANGE = 1e-2  # of the latent of a step, along a direction; at least the root of the rounding
TINY = 1e-12

Place = tuple[int, int]  # of a weight: its step, and the number of its term


def derivatives(
    emulated: EmulatedSampler, latent: Tensor, weights: Weights, rounding: float = 0.0
) -> tuple[Tensor, list[Place], Tensor]:  # fmt: skip
    """The final latents, and their derivative by each weight of a computed step whose term has a value there.

    Args:
        emulated: the run.
        latent: the first one [N, C, ...] float32.
        weights: of all steps.
        rounding: the greatest `finfo.eps` of the model's weights.

    Returns:
        The final latents [N, C, ...]; the weights' places; and the derivatives [places, N, C, ...] float32.
    """
    share = max(CHANGE, math.sqrt(max(rounding, emulated.calls.rounding)))
    state, change = State(latent), State(latent.new_zeros(0, *latent.shape))
    places: list[Place] = []
    for step, row in enumerate(weights):
        if emulated.computes(step):
            output = emulated.calls.model(step, state.latent)
            responses = _responses(emulated, step, state.latent, output, change.latent, share)
            state, change = emulated.after_call(state, output), emulated.after_call(change, responses)
        values = emulated.values(step, state)
        state, change = emulated.moved(step, state, row), emulated.moved(step, change, row)
        if emulated.computes(step):
            live = [number for number, parts in enumerate(values) if parts]
            places += [(step, number) for number in live]
            change = _with_weights(change, [values[number] for number in live], emulated.sampler[step].effect)
    return state.latent, places, change.latent


def _with_weights(change: State, values: Sequence[Sequence[Tensor]], effect: Callable[..., Tensor]) -> State:
    """The derivatives with those by a step's own weights.

    Args:
        change: after the step, by the weights before.
        values: the parts of what each weight is a factor of.
        effect: of the parts on the latent.
    """
    latents = torch.stack([effect(parts) for parts in values])
    none = torch.zeros_like(latents)
    returned = (torch.stack(parts) for parts in zip(*values, strict=True))
    last = (torch.cat([before, added]) for before, added in zip(change.last, returned, strict=True))
    outputs = (tuple(torch.cat([part, none]) for part in output) for output in change.outputs)
    return State(torch.cat([change.latent, latents]), tuple(last), tuple(outputs))


def _responses(
    emulated: EmulatedSampler, step: int, latent: Tensor, output: Parts, changes: Tensor, share: float
) -> Parts:  # fmt: skip
    """How what the model returns changes with each derivative of its latent.

    Args:
        emulated: the run.
        step: that computes the model.
        latent: of the step [N, C, ...].
        output: what the model returned, by part.
        changes: of the latent, by weight [weights, N, C, ...].
        share: of the latent, that is tried as a change.

    Returns:
        By part, the derivatives [weights, N, C, ...].
    """
    if not len(changes):
        return tuple(torch.zeros_like(changes) for _ in output)
    by_sample = changes.flatten(2).transpose(0, 1)
    sizes = by_sample.square().mean((0, 2)).sqrt().clamp_min(TINY)[:, None]  # weights count alike, whatever their unit
    scaled = by_sample / sizes
    products = (scaled @ scaled.mT).double().nan_to_num()  # where it isn't finite the derivatives aren't either
    vectors = torch.linalg.eigh(products)[1][..., -DIRECTIONS:].to(latent)
    directions = (vectors.mT @ scaled).transpose(0, 1).reshape(-1, *latent.shape)
    measured = []
    for direction in directions:
        change = share * _root_mean_square(latent).clamp_min(TINY) / _root_mean_square(direction).clamp_min(TINY)
        moved = emulated.calls.model(step, latent + change * direction)
        measured.append([(after - before) / change for after, before in zip(moved, output, strict=True)])
    mixed = (sizes * vectors).to(latent)
    return tuple(
        torch.einsum("nwd,dn...->wn...", mixed, torch.stack(responses)) for responses in zip(*measured, strict=True)
    )


def _root_mean_square(latent: Tensor) -> Tensor:
    """Of each sample [N, 1, ...]."""
    return latent.square().mean(tuple(range(1, latent.ndim)), keepdim=True).sqrt()
