"""Weights of the forecasts of a plan, fitted to measured displacements: of each step, over a region's kept outputs.

To first order a forecast displaces the latent by the weighted sum of the displacements of its pairs (`drift.py`), if
its weights sum to 1. Steps are fitted one after the other: the weights of a step bring the sum of all displacements so
far nearest to zero, so that a step makes up for those before it. It is ridge least squares around the polynomial's
weights, under that constraint. Sources: Hoerl & Kennard, Ridge Regression, Technometrics 12 (1970); Golub & Van Loan,
Matrix Computations, section 6.2 (the null-space method).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeca_compile.planner.search.anneal import anneal
from moeca_compile.planner.search.drift import SMALLEST, Drift
from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import FULL, NONE, Kinds, Plan
from moeca_compile.schedule.forecast import MAX_KEPT, Weights, polynomial

Array = np.ndarray[Any, np.dtype[np.float64]]
RIDGES = (1e-4, 1e-2)  # of a term's square, that samples which aren't fitted to decide between
PARTS = 2  # of the samples: each is told by a fit to the others
MOVES, HEAT = 8, 1.0  # of the annealing: moves a step; dB
PER_VALUE = 0.3  # dB that each value must gain which is kept beside those of the plan's polynomial


@dataclass(frozen=True)
class FittedForecasts:
    """Weights for a plan.

    Attributes:
        weights: [steps][columns], of each a weight for y0, y1, ...; none: the polynomial's.
        quality: an estimate in dB up to a constant, of samples that weren't fitted to.
        polynomial: the same of the plan's own forecasts.
    """

    weights: tuple[tuple[Weights, ...], ...]
    quality: float
    polynomial: float


@dataclass(frozen=True)
class _Fit:
    """The fit for one plan; the arguments are those of `fitted_forecasts`."""

    drift: Drift
    plan: Plan
    kinds: Kinds
    kept: int

    def run(self, ridge: float | None, samples: Array) -> tuple[list[dict[int, Array]], Array]:
        """Weights of each step by atom, and what all steps displace [numbers].

        Args:
            ridge: relative to the square of a term; None: the polynomial's weights.
            samples: which numbers are fitted to, a mask.
        """
        atoms = self.drift.atoms
        histories: list[tuple[int, ...]] = [()] * len(atoms)
        total: Array = np.zeros(self.drift.parts[0, 0].size)
        steps = []
        for step, letter in enumerate(self.plan.letters):
            terms: dict[int, tuple[Array, Array]] = {}  # by atom: the polynomial's weights, displacements of its pairs
            for atom, columns in enumerate(atoms):
                if self.kinds[letter][columns[0]] is not None:
                    histories[atom] = (step, *histories[atom])[:MAX_KEPT]
                else:
                    terms[atom] = self._terms(atom, histories[atom], step)
            weights = {atom: base for atom, (base, _) in terms.items()}
            if ridge is not None:
                weights = _solved(terms, total, ridge, samples)
            for atom, own in weights.items():
                total = total + own @ terms[atom][1]
            steps.append(weights)
        return steps, total

    def _terms(self, atom: int, history: Sequence[int], step: int) -> tuple[Array, Array]:
        measured = [computed for computed in history[: self.kept] if (computed, step) in self.drift.pairs]
        order = min(PREDICTORS[self.plan.predictor].order, len(measured) - 1)
        base = np.array(polynomial(step, measured[: order + 1])[: len(measured)])
        rows = [self.drift.pairs[computed, step] for computed in measured]
        return base, self.drift.parts[atom, rows].reshape(len(rows), -1).astype(np.float64)


def placed_for_weights(
    drift: Drift, starts: Sequence[Plan], kinds: Kinds, allowed: Callable[[Plan], bool], kept: int
) -> Plan:
    """The plan of the best estimate with fitted weights, by annealing from the best of some plans.

    Args:
        drift: of all columns together; plans have no partial rows.
        starts: at least one, all allowed.
        kinds: the row kinds of the graph.
        allowed: whether a plan fits the budget.
        kept: outputs of a region that a forecast weighs.
    """
    every = np.ones(drift.parts[0, 0].size, dtype=bool)
    estimates: dict[str, float] = {}

    def estimate(plan: Plan) -> float:
        if plan.letters not in estimates:
            is_measured = math.isfinite(drift.quality(plan, kinds))
            total = _Fit(drift, plan, kinds, kept).run(RIDGES[-1], every)[1] if is_measured else None
            estimates[plan.letters] = -math.inf if total is None else _quality(drift, total)
        return estimates[plan.letters]

    start = max(starts, key=estimate)
    if estimate(start) == -math.inf:
        return start
    return anneal(start, (FULL, NONE), estimate, allowed, moves=MOVES * drift.steps, heat=HEAT, seed=0)


def _quality(drift: Drift, total: Array, chosen: Array | None = None) -> float:
    """Of the samples, or of some: the estimate in dB up to a constant."""
    squares = np.square(total).reshape(drift.parts.shape[2], -1).sum(axis=1)
    return mean_psnr([(squares if chosen is None else squares[chosen]).tolist()], 1.0)


def _solved(terms: Mapping[int, tuple[Array, Array]], total: Array, ridge: float, samples: Array) -> dict[int, Array]:
    """The weights of a step, by atom. Weights that sum to 1 are the polynomial's and any multiples of (-1, 1, 0, ...),
    (-1, 0, 1, ...): these are the unknowns."""
    unknown = {atom: len(base) - 1 for atom, (base, _) in terms.items()}
    moves = [shown[1:] - shown[:1] for _, shown in terms.values()]
    begin = total + sum(base @ shown for base, shown in terms.values())
    if not sum(unknown.values()):
        return {atom: base for atom, (base, _) in terms.items()}
    stacked = np.concatenate(moves)[:, samples]
    products = stacked @ stacked.T
    scale = np.sqrt(np.maximum(np.diag(products), SMALLEST))
    scaled = products / np.outer(scale, scale) + ridge * np.eye(len(scale))
    found = np.linalg.solve(scaled, -(stacked @ begin[samples]) / scale) / scale
    parts = np.split(found, np.cumsum(list(unknown.values()))[:-1])
    return {
        atom: base + np.concatenate([[-part.sum()], part])
        for (atom, (base, _)), part in zip(terms.items(), parts, strict=True)
    }


def fitted_forecasts(drift: Drift, plan: Plan, kinds: Kinds, most: int = MAX_KEPT) -> FittedForecasts | None:
    """The weights that are expected to be best, whether that is better than the plan's own forecasts or not.

    Args:
        drift: distinguishes the columns that the plan computes at other steps than others.
        plan: what is computed.
        kinds: the row kinds of the graph.
        most: outputs of a region that a forecast may weigh.

    Returns:
        The weights; None: one output alone has nothing to weigh, there are too few samples to tell, or some pair of the
        plan wasn't measured.
    """
    count = drift.parts.shape[2]
    if most < 2 or count < PARTS or not np.isfinite(drift.quality(plan, kinds)):
        return None
    number_of = np.repeat(np.arange(count), drift.parts.shape[3])

    def checked(kept: int, ridge: float) -> float:
        figures = []
        for part in range(PARTS):
            is_other = np.arange(count) % PARTS == part
            _, total = _Fit(drift, plan, kinds, kept).run(ridge, ~is_other[number_of])
            figures.append(_quality(drift, total, is_other))
        return float(np.mean(figures))

    own_terms = PREDICTORS[plan.predictor].terms
    forms = [(kept, ridge) for kept in range(2, most + 1) for ridge in RIDGES]
    estimates = {form: checked(*form) for form in forms}
    kept, ridge = max(forms, key=lambda form: estimates[form] - PER_VALUE * max(0, form[0] - own_terms))
    everything = np.ones(len(number_of), dtype=bool)
    steps, _ = _Fit(drift, plan, kinds, kept).run(ridge, everything)
    own = _Fit(drift, plan, kinds, own_terms).run(None, everything)[1]
    columns = range(len(next(iter(kinds.values()))))
    atom_of = {column: atom for atom, members in enumerate(drift.atoms) for column in members}
    single: Weights = (1.0,) if own_terms == 1 else ()  # of order 0: its schedule would extrapolate
    table = tuple(tuple(_cell(weights, atom_of[column], single) for column in columns) for weights in steps)
    return FittedForecasts(table, estimates[kept, ridge], _quality(drift, own))


def _cell(weights: Mapping[int, Array], atom: int, single: Weights) -> Weights:
    """`single`: in place of the weight of one output alone."""
    if atom not in weights:
        return ()
    return tuple(weights[atom].tolist()) if len(weights[atom]) > 1 else single
