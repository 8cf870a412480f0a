"""The errors of forecasts as numbers, and from them an estimate of a plan's quality.

The measurements are *pairs* (a, s): the displacement of the latent at step s if the regions' outputs are those of step
a. A forecast is a weighted sum of earlier outputs with weights that sum to 1, so to first order its displacement is the
same weighted sum of the displacements of the pairs: one set of pairs serves every predictor. The error of a plan is
estimated as the sum over its steps of these displacements as *vectors*: errors of opposite sign cancel, which a sum of
norms would miss.

The estimate assumes that the displacement of a step reaches the final sample unchanged, and that a region that a
partial row computes is exact. It is good enough to rank plans; `search` rolls out the best of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.planner.search.refresh import Errors
from moeca_compile.planner.search.rows import FULL, NONE, Kinds, Plan

Array = np.ndarray[Any, np.dtype[np.float32]]
Terms = tuple[tuple[int, float], ...]  # (row of a pair in `parts`, weight)
SMALLEST = 1e-14


@dataclass
class Drift:
    """Displacements of the latent, by pair.

    Attributes:
        steps: of the trajectory.
        pairs: (a, s) -> its row in `parts`.
        atoms: groups of columns that were displaced separately.
        parts: [atoms, pairs, samples, numbers] float32: the displacement that each atom alone causes. Each sample's is
            a random projection to a few numbers, which is linear and approximately preserves norms.
    """

    steps: int
    pairs: Mapping[tuple[int, int], int]
    atoms: tuple[tuple[int, ...], ...]
    parts: Array
    _memo: dict[tuple[str, tuple[int, ...], int, bool], Terms | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._flat = self.parts.reshape(*self.parts.shape[:2], -1)
        self._total = self._flat.sum(axis=0)  # of all atoms

    @cached_property
    def lookback(self) -> int:
        """The greatest distance s - a of a pair, in steps."""
        return max((s - a for a, s in self.pairs), default=0)

    def quality(self, plan: Plan, kinds: Kinds, clamp: bool = False) -> float:
        """The estimated quality of a plan.

        Args:
            plan: of `steps` letters.
            kinds: the row kinds of the graph.
            clamp: treat outputs older than `lookback` as the oldest measured ones. The estimate is then an upper bound.

        Returns:
            dB up to a constant, higher is better; -inf if a pair was not measured.
        """
        shared_terms: list[tuple[int, float]] = []  # of all atoms together
        atom_terms: list[list[tuple[int, float]]] = [[] for _ in self.atoms]
        histories: list[tuple[int, ...]] = [()] * len(self.atoms)
        for step, letter in enumerate(plan.letters):
            computed = [kinds[letter][atom[0]] is not None for atom in self.atoms]
            same_history = not any(computed) and len(set(histories)) == 1
            for atom, is_computed in enumerate(computed):
                if is_computed:
                    histories[atom] = (step, *histories[atom])[:3]
                    continue
                terms = self._terms(plan.predictor, histories[atom], step, clamp)
                if terms is None:
                    return -math.inf
                (shared_terms if same_history else atom_terms[atom]).extend(terms)
                if same_history:
                    break
        displacement = self._weighted_sum(self._total, shared_terms)
        for flat, terms_of_atom in zip(self._flat, atom_terms, strict=True):
            displacement = displacement + self._weighted_sum(flat, terms_of_atom)
        squares = np.square(displacement).reshape(self.parts.shape[2], -1).sum(axis=1)
        return float(-10 * np.log10(squares + SMALLEST).mean())

    def _weighted_sum(self, flat: Array, terms: Sequence[tuple[int, float]]) -> Array:
        """Rows of `flat` [pairs, samples x numbers], weighted and summed."""
        if not terms:
            return np.zeros(flat.shape[1], np.float32)
        rows, weights = zip(*terms, strict=True)
        return np.asarray(np.asarray(weights, np.float32) @ flat[list(rows)])

    def _terms(self, predictor: str, history: tuple[int, ...], step: int, clamp: bool = False) -> Terms | None:
        """The weighted pairs of a forecast; None: one of them was not measured."""
        key = (predictor, history, step, clamp)
        if key not in self._memo:
            weights = PREDICTORS[predictor].weights(step, history)
            oldest = step - self.lookback if clamp else 0
            rows = [(self.pairs.get((max(a, oldest), step)), weight) for a, weight in weights]
            measured = tuple((row, weight) for row, weight in rows if row is not None)
            self._memo[key] = measured if len(measured) == len(rows) else None
        return self._memo[key]

    def errors(self, predictor: str, max_gap: int) -> Errors:
        """For the dynamic program (`refresh.py`): norms of the displacements of forecasts, by (p, a, s).

        Args:
            predictor: its name.
            max_gap: s - a is below this, in steps; a - p is at most this.
        """
        errors = {}
        for a, s in self.pairs:
            if s - a < max_gap:
                for p in [*range(max(0, a - max_gap), a), *([-1] if a == 0 else [])]:
                    terms = self._terms(predictor, (a,) if p < 0 else (a, p), s)
                    if terms is not None:
                        errors[p, a, s] = float(np.linalg.norm(self._weighted_sum(self._total, terms)))
        return errors


def extended(split: Drift, total: Drift) -> Drift:
    """`split` with the pairs that only `total` has.

    The displacement of such a pair takes its direction from the oldest pair of `split` for the same step. Its norm is
    scaled by the ratio of the two pairs' norms in `total`.
    """
    norms = np.sqrt(np.square(total.parts.sum(axis=0)).sum(axis=-1).mean(axis=-1))  # [pairs]
    parts = np.empty((len(split.atoms), len(total.pairs), *split.parts.shape[2:]), np.float32)
    for (a, s), row in total.pairs.items():
        oldest = (max(a, s - split.lookback), s)
        scale = norms[row] / max(norms[total.pairs[oldest]], SMALLEST) if oldest != (a, s) else 1.0
        parts[:, row] = split.parts[:, split.pairs[oldest]] * scale
    return Drift(total.steps, total.pairs, split.atoms, parts)


def pairs_of(steps: int, lookback: int) -> list[tuple[int, int]]:
    """All pairs (a, s) with a at most `lookback` steps before s."""
    return [(a, s) for s in range(1, steps) for a in range(max(0, s - lookback), s)]


def full_plan(steps: int) -> Plan:
    """The plan that computes every step."""
    return Plan(FULL * steps, "order-0")


def cheapest_plan(steps: int, predictor: str = "order-0") -> Plan:
    """The plan that computes the first step only."""
    return Plan(FULL + NONE * (steps - 1), predictor)
