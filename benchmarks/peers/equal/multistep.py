"""Calibrated multistep: a sampler that calls the network at few steps, placed offline, and needs no compiler.

Between two of its steps x moves by a linear combination of the last guided outputs: that of the polynomial through
them, or one fitted to recorded states. Steps are placed by annealing on the Gram matrix of recorded outputs: the error
at the end is taken as the sum of the errors of the moves, as if the outputs didn't answer to x.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

Guided = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # x, t -> guided velocity, conditional less unconditional
Nodes = Callable[[int, int], tuple[np.ndarray, np.ndarray]]  # steps a move spans -> where v is summed, and its weights

Weigh = Callable[[tuple[int, ...], int], np.ndarray]  # computed steps, newest first, and a step -> their weights there

HISTORY, DIFFERENCES = 3, 2  # outputs, and differences of guidance, that fitted weights see
RIDGE = 1e-7
PROPOSALS = 20_000


def euler_sum(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """What Euler's method sums between two steps: the target is the uncached run."""
    return np.arange(start, stop, dtype=float), np.ones(stop - start)


def integral(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss's rule, exact for the polynomials used here: the target is the converged solution."""
    nodes, weights = np.polynomial.legendre.leggauss(2)
    half = (stop - start) / 2
    return (start + stop) / 2 + half * nodes, half * weights


@cache
def weights_of(known: tuple[int, ...], start: int, stop: int, nodes_of: Nodes) -> tuple[float, ...]:
    """Of the outputs at `known` steps, newest first: the sum over a move of the polynomial through them, in steps."""
    nodes, scales = nodes_of(start, stop)
    found = []
    for own in known:
        basis = np.ones_like(nodes)
        for other in known:
            if other != own:
                basis = basis * (nodes - other) / (own - other)
        found.append(float(scales @ basis))
    return tuple(found)


def moves(at: Sequence[int], steps: int, order: int) -> list[tuple[tuple[int, ...], int, int]]:
    """For each computed step: the steps whose outputs are known, newest first, and where the move begins and ends."""
    ends = [*at[1:], steps]
    return [
        (tuple(reversed(at[max(0, index - order) : index + 1])), at[index], ends[index]) for index in range(len(at))
    ]


def place(gram: np.ndarray, count: int, order: int, nodes_of: Nodes, stride: int = 1, seed: int = 0) -> list[int]:
    """The computed steps with the least error at the end.

    Args:
        gram: inner products of the outputs recorded at every step, (steps, steps); their sum is the target.
        count: how many steps compute, the first one among them.
        order: of the polynomial.
        nodes_of: `euler_sum` or `integral`.
        stride: computed steps are multiples of it.
        seed: of the annealing.
    """
    steps, rng = len(gram), random.Random(seed)

    def error(at: Sequence[int]) -> float:
        difference = np.full(steps, -1.0)
        for known, start, stop in moves(at, steps, order):
            for step, weight in zip(known, weights_of(known, start, stop, nodes_of), strict=True):
                difference[step] += weight
        return float(difference @ gram @ difference)

    places = steps // stride
    at = sorted({round(index * places / count) * stride for index in range(count)})
    now = error(at)
    best, least = list(at), now
    for proposal in range(PROPOSALS):
        heat = 1.0 * (1 - proposal / PROPOSALS) ** 2
        moved = rng.randrange(1, count)
        step = at[moved] + stride * rng.choice((-3, -2, -1, 1, 2, 3))
        if step in at or not 0 < step < steps:
            continue
        tried = sorted([*at[:moved], step, *at[moved + 1 :]])
        level = error(tried)
        if level < now or (heat > 0 and rng.random() < math.exp(math.log(now / level) / heat)):
            at, now = tried, level
            if now < least:
                best, least = list(at), now
    return best


@dataclass(frozen=True)
class Multistep:
    """A sampler of few steps.

    Attributes:
        at: the computed ones of `steps`.
        moved: for each of them the weights of `features`.
        history: how many outputs are kept.
    """

    at: tuple[int, ...]
    steps: int
    moved: tuple[tuple[float, ...], ...]
    history: int = HISTORY

    def sample(self, guided: Guided, x: Tensor) -> Tensor:
        kept: list[tuple[Tensor, Tensor]] = []
        for step, weights in zip(self.at, self.moved, strict=True):
            kept = [guided(x, 1 - step / self.steps), *kept][: self.history]
            x = x + sum(weight * one for weight, one in zip(weights, features(x, kept), strict=False))
        return x


def features(x: Tensor, kept: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """x, the last guided outputs, the last differences; newest first."""
    return [x, *(output for output, _ in kept), *(difference for _, difference in kept[:DIFFERENCES])]


def polynomial(at: Sequence[int], steps: int, order: int, nodes_of: Nodes) -> Multistep:
    """The weights of the polynomial of that order, at most 2."""
    moved = [(0.0, *(-one / steps for one in weights_of(*move, nodes_of))) for move in moves(at, steps, order)]
    return Multistep(tuple(at), steps, tuple(moved))


def fitted(at: Sequence[int], guided: Guided, states: Sequence[Tensor]) -> Multistep:
    """Ridge least squares of each move on recorded states; later moves are fitted on the states that earlier ones give.

    Args:
        guided: of the digits whose states are given.
        states: before each step, and the last one: steps + 1.
    """
    steps, x = len(states) - 1, states[0]
    kept: list[tuple[Tensor, Tensor]] = []
    moved: list[tuple[float, ...]] = []
    for start, stop in zip(at, [*at[1:], steps], strict=True):
        kept = [guided(x, 1 - start / steps), *kept][:HISTORY]
        known = features(x, kept)
        matrix = torch.stack([one.flatten() for one in known], 1).double()
        normal = matrix.T @ matrix
        normal += RIDGE * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64)
        weights = torch.linalg.solve(normal, matrix.T @ (states[stop] - x).flatten().double()).tolist()
        moved.append(tuple(weights))
        x = x + sum(weight * one for weight, one in zip(weights, known, strict=True))
    return Multistep(tuple(at), steps, tuple(moved))


def forecast(at: Sequence[int], steps: int, weigh: Weigh) -> Multistep:
    """Euler's loop over all steps, with the outputs between the computed ones forecast from all computed before."""
    moved = []
    for known, start, stop in moves(at, steps, steps):
        summed = np.zeros(len(known))
        for step in range(start, stop):
            summed += weigh(known, step)
        moved.append((0.0, *(-summed / steps).tolist()))
    return Multistep(tuple(at), steps, tuple(moved), history=len(at))


def surrogate(rule: Multistep, gram: np.ndarray) -> float:
    """The squared error at the end of a rule of outputs alone, as if the outputs didn't answer to x.

    Args:
        rule: of as many steps as were recorded.
        gram: as for `place`.
    """
    difference = np.full(rule.steps, -1.0)
    for index, weights in enumerate(rule.moved):
        newest_first = rule.at[index::-1]
        for step, weight in zip(newest_first, weights[1:], strict=False):
            difference[step] -= weight * rule.steps
    return float(difference @ gram @ difference)
