"""Sums that grow while a trajectory runs, each over another: what is kept of it, whatever its length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Sum = torch.Tensor | Sequence[float] | float


class Ratios:
    """For each quantity and line, at each step, numerators and denominators; a vector holds several side by side."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], dict[int, np.ndarray]] = {}

    def add(self, what: str, line: str, step: int, over: Sum, under: Sum) -> None:
        """Add scalars, or vectors of one length."""
        pair = np.stack([_vector(over), _vector(under)])
        steps = self._sums.setdefault((what, line), {})
        steps[step] = steps[step] + pair if step in steps else pair

    def of(self, line: str) -> list[str]:
        """The quantities that were seen of a line."""
        return [what for what, name in self._sums if name == line]

    def by_step(self, what: str, line: str, steps: int) -> np.ndarray:
        """[steps, entries]: the ratios; nan where nothing was seen."""
        seen = self._sums[what, line]
        width = next(iter(seen.values())).shape[1]
        nothing = np.zeros((2, width))
        return np.stack([_ratio(seen.get(step, nothing)) for step in range(steps)])

    def over_all(self, what: str, line: str) -> np.ndarray:
        """[entries]: the sums of all steps over each other."""
        return _ratio(np.sum(list(self._sums[what, line].values()), axis=0))


def _vector(one: Sum) -> np.ndarray:
    values = one.detach().double().cpu().numpy() if isinstance(one, torch.Tensor) else np.asarray(one, dtype=float)
    return values.reshape(-1)


def _ratio(pair: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pair[1] > 0, pair[0] / pair[1], np.nan)
