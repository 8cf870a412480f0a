"""What every contender does: digits of the trained DiT-MoE, in batches, by a rectified flow with guidance.

The digits are held out: no schedule was calibrated and no threshold fitted on their noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moeca_compile as moeca
from examples import digits

SEED, CALIBRATION_SEED = 5000, 0
GUIDANCE = 2.0

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Size:
    """How much is measured: each of `rounds` timed trajectories draws other digits, so rounds x digits tell quality."""

    digits: int  # a trajectory; the model sees twice as many samples
    rounds: int
    steps: int
    converged: int  # second-order steps of the reference


WHOLE = Size(digits=8, rounds=5, steps=50, converged=200)
QUICK = Size(digits=2, rounds=1, steps=8, converged=16)


@dataclass(frozen=True)
class Batch:
    """Digits that are drawn together: noise (n,1,16,16), labels (n,)."""

    noise: Tensor
    labels: Tensor


def batches(size: Size, seed: int = SEED) -> list[Batch]:
    """The digits of each round, every class as often as can be."""
    count = size.digits * size.rounds
    noise = digits.initial_noise(seed, count).split(size.digits)
    return [Batch(*pair) for pair in zip(noise, digits.labels_of(count).split(size.digits), strict=True)]


def inputs_of(batch: Batch, t: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A call of the model: conditional half first. x (2n,1,16,16), t (2n,) times 1000, labels (2n,)."""
    return _doubled(batch.noise), torch.full((2 * len(batch.noise),), 1000.0 * t), _with_null(batch.labels)


def guided(model: Any, batch: Batch) -> Velocity:
    """The velocity with classifier-free guidance, both halves in one call: x (n,1,16,16), t in [0, 1]."""
    labels = _with_null(batch.labels)

    def velocity(x: Tensor, t: float) -> Tensor:
        cond, uncond = model(_doubled(x), torch.full((2 * len(x),), 1000.0 * t), labels).chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    return velocity


def shipped() -> digits.DiTMoE:
    """The network with the expert loop on the host that it ships with."""
    return digits.load_model().requires_grad_(False)


def prepared() -> digits.DiTMoE:
    """The same with a dispatch that can be traced: what gives every contender its fastest legal path."""
    model = shipped()
    moeca.prepare(model)
    return model


def _doubled(x: Tensor) -> Tensor:
    return torch.cat([x, x])


def _with_null(labels: Tensor) -> Tensor:
    return torch.cat([labels, torch.full_like(labels, digits.CLASSES)])
