"""Ratios of sums over a trajectory: memory does not grow with its length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Sum = torch.Tensor | Sequence[float] | float


class Ratios:
    """Numerators and denominators for each quantity, key and step; scalars or vectors."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], dict[int, np.ndarray]] = {}

    def add(self, quantity: str, key: str, step: int, numerator: Sum, denominator: Sum) -> None:
        """Add scalars, or vectors of equal length."""
        pair = np.stack([_vector(numerator), _vector(denominator)])
        steps = self._sums.setdefault((quantity, key), {})
        steps[step] = steps[step] + pair if step in steps else pair

    def of(self, key: str) -> list[str]:
        """The quantities of a key."""
        return [quantity for quantity, other in self._sums if other == key]

    def by_step(self, quantity: str, key: str, steps: int) -> np.ndarray:
        """[steps, entries]: the ratio at each step; nan for a step without values."""
        sums = self._sums[quantity, key]
        width = next(iter(sums.values())).shape[1]
        empty = np.zeros((2, width))
        return np.stack([_ratio(sums.get(step, empty)) for step in range(steps)])

    def over_all(self, quantity: str, key: str) -> np.ndarray:
        """[entries]: the ratio of the sums over all steps."""
        return _ratio(np.sum(list(self._sums[quantity, key].values()), axis=0))


def _vector(values: Sum) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().double().cpu().numpy().reshape(-1)
    return np.asarray(values, dtype=float).reshape(-1)


def _ratio(pair: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pair[1] > 0, pair[0] / pair[1], np.nan)
