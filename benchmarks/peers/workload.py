"""What every contender does: images drawn in batches by a rectified flow with guidance, on one model.

A workload gives the model as shipped, its inputs, and where in it the peers cache; the contenders know no more of it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import moeca_compile as moeca
from benchmarks.peers.solvers import Solver, Velocity, euler

SEED, CALIBRATION_SEED = 7000, 0


@dataclass(frozen=True)
class Size:
    """How much is measured: each of `rounds` timed trajectories draws other images, so rounds x digits tell quality."""

    digits: int  # images a trajectory; the model sees twice as many samples
    rounds: int
    steps: int
    converged: int = 0  # second-order steps of the reference; 0: there is none


@dataclass(frozen=True)
class Batch:
    """Images that are drawn together: noise (n,C,H,W), labels (n,): classes, or numbers of prompts."""

    noise: Tensor
    labels: Tensor


@dataclass
class Truth:
    """What all are compared with: the uncached images of each batch, and the exact solution's where it is known."""

    batches: Sequence[Batch]
    uncached: Tensor
    converged: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        return torch.cat([batch.labels for batch in self.batches])


@dataclass(frozen=True)
class Workload(ABC):
    """A model and how a sampler calls it: x (2n,C,H,W), t (2n,) times 1000, conditions; conditional half first.

    Attributes:
        result: the name of its file in benchmarks/results.
        modules: patterns of the names of its attention and MoE modules: what FORA and TaylorSeer cache.
        stacks: its lists of blocks, and which of cache-dit's forward patterns the blocks of each have.
        functor: of cache-dit, what rewrites the model's forward so that the blocks fit a pattern.
        fixed_batch: its graph is for one number of samples.
        speed_only: its weights are random, so that no figure of quality means anything.
    """

    size: Size

    result: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    stacks: ClassVar[dict[str, str]]
    functor: ClassVar[str | None] = None
    guidance: ClassVar[float] = 2.0
    fixed_batch: ClassVar[bool] = False
    speed_only: ClassVar[bool] = True

    @property
    @abstractmethod
    def model(self) -> str:
        """What it is, in words."""

    @abstractmethod
    def shipped(self) -> nn.Module:
        """The network with the expert loop on the host that it ships with, seeded; eval, float32."""

    @abstractmethod
    def batches(self, seed: int = SEED) -> list[Batch]:
        """What is drawn in each round."""

    @abstractmethod
    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the model takes after x and t, for 2n samples."""

    def read(self, output: Any) -> Tensor:
        """The velocity (2n,C,H,W) in what the model returns."""
        velocity: Tensor = output
        return velocity

    def prepared(self) -> Any:
        """The same with a dispatch that can be traced: what gives every contender its fastest legal path."""
        model = self.shipped()
        moeca.prepare(model)
        return model

    def inputs_of(self, batch: Batch, t: float = 1.0) -> tuple[Tensor, ...]:
        """One call of the model."""
        return self._call(batch.noise, t, self.conditions(batch))

    def velocity(self, model: Any, batch: Batch) -> Velocity:
        """With classifier-free guidance, both halves in one call: x (n,C,H,W), t in [0, 1]."""
        conditions = self.conditions(batch)

        def velocity(x: Tensor, t: float) -> Tensor:
            cond, uncond = self.read(model(*self._call(x, t, conditions))).chunk(2)
            return uncond + self.guidance * (cond - uncond)

        return velocity

    def draw(self, model: Any, batch: Batch, steps: int | None = None, solver: Solver = euler) -> Tensor:
        """A whole trajectory: (n,C,H,W)."""
        return solver(self.velocity(model, batch), batch.noise, steps or self.size.steps)

    def names(self, model: nn.Module) -> list[str]:
        """Of the modules that `modules` means."""
        names = [name for name, _ in model.named_modules()]
        return [name for name in names if any(re.fullmatch(pattern, name) for pattern in self.modules)]

    def truth(self) -> Truth:
        """Drawn now, eager, as shipped."""
        batches, model = self.batches(), self.shipped()
        return Truth(batches, torch.cat([self.draw(model, batch) for batch in batches]))

    def figures(self, images: Tensor, truth: Truth) -> dict[str, Any]:
        """What is told of the images of all rounds."""
        return {"relative_l2": relative_l2(images, truth.uncached), "finite": bool(torch.isfinite(images).all())}

    def _call(self, x: Tensor, t: float, conditions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.cat([x, x]), torch.full((2 * len(x),), 1000.0 * t), *conditions


def latents(size: Size, seed: int, *shape: int) -> Tensor:
    """Noise of all rounds: (rounds, digits, *shape)."""
    return torch.randn(size.rounds, size.digits, *shape, generator=torch.Generator().manual_seed(seed))


def relative_l2(images: Tensor, truth: Tensor) -> float:
    return float(f"{((images - truth).norm() / truth.norm()).item():.4g}")


def with_null(labels: Tensor, null: int) -> Tensor:
    """The labels, then as many of the class that means none."""
    return torch.cat([labels, torch.full_like(labels, null)])
