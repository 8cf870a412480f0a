"""Inner products of the vectors of a trajectory: all that a fit of the output's weights needs, whatever their size.

Everything that a fit forms is a weighted sum of a few vectors: the first latent, what the model returned at each step,
the wanted latents. A sum is an array of weights over them, and its norm follows from their inner products.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from moeca_compile.planner.output.paths import Path

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Gram:
    """Inner products, summed over trajectories.

    Attributes:
        names: of the vectors: ("begin",), ("output", step, part), ("wanted", step).
        products: [vectors, vectors] float64.
        numbers: in one vector, of all trajectories together.
    """

    names: tuple[Hashable, ...]
    products: Array
    numbers: int

    @cached_property
    def _places(self) -> dict[Hashable, int]:
        return {name: place for place, name in enumerate(self.names)}

    def vector(self, *name: Hashable) -> Array:
        """A vector as an array of weights [vectors]."""
        weights = np.zeros(len(self.names))
        weights[self._places[name]] = 1.0
        return weights

    def square(self, weights: Array) -> float:
        """The mean square of the numbers of a weighted sum."""
        return max(0.0, float(weights @ self.products @ weights)) / self.numbers

    def __add__(self, other: Gram) -> Gram:
        """Of both sets of trajectories."""
        assert self.names == other.names
        return Gram(self.names, self.products + other.products, self.numbers + other.numbers)


def gram_of(path: Path, wanted: Sequence[torch.Tensor]) -> Gram:
    """The inner products of one trajectory.

    Args:
        path: its first latent and the outputs of its computed steps are used.
        wanted: the wanted latent [N, C, ...] after each step.
    """
    channels = path.states[0].shape[1]
    vectors: dict[Hashable, torch.Tensor] = {("begin",): path.states[0]}
    for step, parts in sorted(path.outputs.items()):
        for part, output in enumerate(parts):
            vectors["output", step, part] = output[:, :channels]  # a learned variance has channels of its own
    vectors |= {("wanted", step): state for step, state in enumerate(wanted)}
    stacked = torch.stack([vector.flatten() for vector in vectors.values()]).double()
    return Gram(tuple(vectors), (stacked @ stacked.T).numpy(), stacked.shape[1])


def summed(grams: Sequence[Gram]) -> Gram:
    """Of all trajectories of several grams, at least one."""
    total = grams[0]
    for gram in grams[1:]:
        total = total + gram
    return total
