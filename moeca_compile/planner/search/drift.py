"""How far forecasts are off, as numbers, and from them what a plan would do to the samples.

Measured are *pairs* (a, s): how far the latent is moved at step s when the regions' outputs are those of step a. A
forecast is a weighted sum of earlier outputs and its weights add up to 1, so to first order its displacement is the
same weighted sum of the pairs' displacements: one set of pairs serves every predictor. A plan's error is estimated as
the sum over its steps of those displacements as *vectors*: errors of opposite sign cancel, which sums of norms miss.

It is an estimate: a step's displacement counts in full for the final sample, and a region that a partial row
computes is taken to be right. Good enough to rank plans; `search` rolls the best out.
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
Terms = tuple[tuple[int, float], ...]
SMALLEST = 1e-14


@dataclass
class Drift:
    """Displacements by pair.

    Attributes:
        steps: of the trajectory.
        pairs: (a, s) -> its row in `parts`.
        atoms: the columns in groups that were displaced separately.
        parts: [atoms, pairs, samples, numbers] float32: the displacements that each group alone makes, each sample's
            as a random projection to a few numbers, which keeps norms and sums.
    """

    steps: int
    pairs: Mapping[tuple[int, int], int]
    atoms: tuple[tuple[int, ...], ...]
    parts: Array
    _memo: dict[tuple[str, tuple[int, ...], int, bool], Terms | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._flat = self.parts.reshape(*self.parts.shape[:2], -1)
        self._whole = self._flat.sum(axis=0)

    @cached_property
    def lookback(self) -> int:
        return max((s - a for a, s in self.pairs), default=0)

    def quality(self, plan: Plan, kinds: Kinds, beyond: bool = False) -> float:
        """Estimated decibels, up to a constant: higher is better; -inf where a pair wasn't measured.

        beyond: outputs older than was measured count as the oldest measured: kinder to the plan than the truth is, as
        a bound wants it.
        """
        together: list[tuple[int, float]] = []
        apart: list[list[tuple[int, float]]] = [[] for _ in self.atoms]
        seen: list[tuple[int, ...]] = [()] * len(self.atoms)
        for step, letter in enumerate(plan.letters):
            computed = [kinds[letter][atom[0]] is not None for atom in self.atoms]
            alike = not any(computed) and len(set(seen)) == 1
            for number, done in enumerate(computed):
                if done:
                    seen[number] = (step, *seen[number])[:3]
                    continue
                terms = self._terms(plan.predictor, seen[number], step, beyond)
                if terms is None:
                    return -math.inf
                (together if alike else apart[number]).extend(terms)
                if alike:
                    break
        moved = self._sum(self._whole, together)
        for flat, found in zip(self._flat, apart, strict=True):
            moved = moved + self._sum(flat, found)
        squares = np.square(moved).reshape(self.parts.shape[2], -1).sum(axis=1)
        return float(-10 * np.log10(squares + SMALLEST).mean())

    def _sum(self, flat: Array, terms: Sequence[tuple[int, float]]) -> Array:
        if not terms:
            return np.zeros(flat.shape[1], np.float32)
        rows, weights = zip(*terms, strict=True)
        return np.asarray(np.asarray(weights, np.float32) @ flat[list(rows)])

    def _terms(self, predictor: str, seen: tuple[int, ...], step: int, beyond: bool = False) -> Terms | None:
        key = (predictor, seen, step, beyond)
        if key not in self._memo:
            weights = PREDICTORS[predictor].weights(step, seen)
            oldest = step - self.lookback if beyond else 0
            rows = [(self.pairs.get((max(a, oldest), step)), weight) for a, weight in weights]
            known = tuple((row, weight) for row, weight in rows if row is not None)
            self._memo[key] = known if len(known) == len(rows) else None
        return self._memo[key]

    def errors(self, predictor: str, max_gap: int) -> Errors:
        """For the dynamic programme: the displacement's norm at s, forecast from a and p (-1: from a alone)."""
        found = {}
        for a, s in self.pairs:
            if s - a < max_gap:
                for p in [*range(max(0, a - max_gap), a), *([-1] if a == 0 else [])]:
                    terms = self._terms(predictor, (a,) if p < 0 else (a, p), s)
                    if terms is not None:
                        found[p, a, s] = float(np.linalg.norm(self._sum(self._whole, terms)))
        return found


def extended(split: Drift, whole: Drift) -> Drift:
    """`split` with the pairs that only `whole` has.

    Their displacements are taken to point where the oldest measured ones do, and to be as much larger as the whole is.
    """
    size = np.sqrt(np.square(whole.parts.sum(axis=0)).sum(axis=-1).mean(axis=-1))  # [pairs]
    parts = np.empty((len(split.atoms), len(whole.pairs), *split.parts.shape[2:]), np.float32)
    for (a, s), row in whole.pairs.items():
        near = (max(a, s - split.lookback), s)
        grown = size[row] / max(size[whole.pairs[near]], SMALLEST) if near != (a, s) else 1.0
        parts[:, row] = split.parts[:, split.pairs[near]] * grown
    return Drift(whole.steps, whole.pairs, split.atoms, parts)


def pairs_of(steps: int, lookback: int) -> list[tuple[int, int]]:
    """All pairs (a, s) with a at most `lookback` before s."""
    return [(a, s) for s in range(1, steps) for a in range(max(0, s - lookback), s)]


def full_plan(steps: int) -> Plan:
    return Plan(FULL * steps, "order-0")


def cheapest_plan(steps: int, predictor: str = "order-0") -> Plan:
    """Computes the first step only."""
    return Plan(FULL + NONE * (steps - 1), predictor)
