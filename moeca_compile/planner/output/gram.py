"""Inner products of the vectors of a trajectory: all that a fit of the output's weights needs, whatever their size.

Everything that a fit forms is a weighted sum of a few vectors: the first latent, what the model returned at each step,
the wanted latents. A sum is an array of weights over them, and its norm follows from their inner products.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from moeca_compile.planner.output.paths import Path

PART = 2**16  # numbers of each vector that are multiplied at once: float64 copies of all would be large
Array = np.ndarray[Any, np.dtype[np.float64]]
Value = TypeVar("Value", Array, torch.Tensor)  # weights over the vectors, or a vector itself


@dataclass(frozen=True)
class Gram:
    """Inner products, summed over trajectories.

    Attributes:
        names: of the vectors: ("begin",), ("output", step, part), ("wanted", step); and ("at", step), the latent that
            the outputs of a step were made from, where it isn't the wanted one.
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

    def made_at(self, step: int) -> Array:
        """The latent that the outputs of a step were made from, as weights."""
        return self.vector("at", step) if ("at", step) in self._places else self.vector("wanted", step)

    def square(self, weights: Array) -> float:
        """The mean square of the numbers of a weighted sum."""
        return max(0.0, float(weights @ self.products @ weights)) / self.numbers

    def taken(self, names: Mapping[Hashable, Hashable]) -> Gram:
        """Of some vectors alone, each under a new name. `names`: new to old."""
        places = [self._places[old] for old in names.values()]
        return Gram(tuple(names), self.products[np.ix_(places, places)], self.numbers)

    def __add__(self, other: Gram) -> Gram:
        """Of both sets of trajectories."""
        assert self.names == other.names
        return Gram(self.names, self.products + other.products, self.numbers + other.numbers)


@dataclass(frozen=True)
class Grams:
    """Of trajectories that weights are fitted to, of those that tell how good the weights are, and of all."""

    fitted: Gram
    checked: Gram
    all: Gram

    def taken(self, names: Mapping[Hashable, Hashable]) -> Grams:
        """As `Gram.taken`, of each."""
        return Grams(self.fitted.taken(names), self.checked.taken(names), self.all.taken(names))


def gram_of(path: Path, wanted: Sequence[torch.Tensor]) -> Gram:
    """The inner products of one trajectory.

    Args:
        path: its first latent and the outputs of its computed steps are used.
        wanted: the wanted latent [N, C, ...] before each step, and after the last.
    """
    channels = path.states[0].shape[1]
    vectors: dict[Hashable, torch.Tensor] = {("begin",): path.states[0]}
    for step, parts in sorted(path.outputs.items()):
        for part, output in enumerate(parts):
            vectors["output", step, part] = output[:, :channels]  # a learned variance has channels of its own
    vectors |= {("wanted", step): state for step, state in enumerate(wanted)}
    if wanted is not path.states:
        vectors |= {("at", step): path.states[step] for step in path.outputs}
    stacked = torch.stack([vector.flatten() for vector in vectors.values()])
    products = torch.zeros(len(stacked), len(stacked), dtype=torch.float64)
    for part in stacked.split(PART, dim=1):
        products.addmm_(part.double(), part.double().T)
    return Gram(tuple(vectors), products.numpy(), stacked.shape[1])


def summed(grams: Sequence[Gram]) -> Gram:
    """Of all trajectories of several grams, at least one."""
    total = grams[0]
    for gram in grams[1:]:
        total = total + gram
    return total
