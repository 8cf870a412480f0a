"""Simulated annealing on the estimated quality: thousands of plans a second, none of them sampled."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from moeca_compile.planner.search.rows import FULL, NONE, Plan


def anneal(
    start: Plan,
    letters: Sequence[str],
    quality: Callable[[Plan], float],
    allowed: Callable[[Plan], bool],
    *,
    moves: int = 2000,
    heat: float = 2.0,
    seed: int = 0,
) -> Plan:
    """The best allowed plan seen in a walk from `start` that takes worse ones ever more seldom.

    letters: the row kinds it may use. heat: decibels that a step may lose at the start, about.
    """
    dice = random.Random(seed)
    here = best = start
    now = top = quality(start)
    for move in range(moves):
        letters_now = _moved(here.letters, letters, dice)
        if letters_now is None:
            continue
        plan = Plan(letters_now, here.predictor)
        if not allowed(plan):
            continue
        new = quality(plan)
        cooled = heat * (1 - move / moves) ** 2 + 1e-3
        if new >= now or dice.random() < math.exp((new - now) / cooled):
            here, now = plan, new
            if new > top:
                best, top = plan, new
    return best


def _moved(plan: str, letters: Sequence[str], dice: random.Random) -> str | None:
    """One random move; the first step stays computed. None: it would change nothing."""
    steps = len(plan)
    at = dice.randrange(1, steps) if steps > 1 else 0
    kind = dice.random()
    if kind < 0.6:  # a row that computes something, a little earlier or later
        busy = [step for step in range(1, steps) if plan[step] != NONE]
        if not busy:
            return None
        at = dice.choice(busy)
        to = at + dice.choice((-2, -1, 1, 2))
    elif kind < 0.8:  # two rows change places
        to = dice.randrange(1, steps)
    else:  # another row here, and perhaps another one elsewhere to pay for it
        changed = put(plan, at, dice.choice(letters))
        if dice.random() < 0.7:
            changed = put(changed, dice.randrange(1, steps), dice.choice(letters))
        return None if changed == plan else changed
    if not 0 < to < steps or plan[at] == plan[to]:
        return None
    return put(put(plan, at, plan[to]), to, plan[at])


def polish(plan: Plan, quality: Callable[[Plan], float], allowed: Callable[[Plan], bool]) -> Plan:
    """The plan with more rows computed, or computed a step earlier or later, for as long as that gains."""
    while True:
        text = plan.letters
        near = [put(text, at, FULL) for at in range(1, len(text))]
        near += [put(put(text, at, text[at + 1]), at + 1, text[at]) for at in range(1, len(text) - 1)]
        fits = [one for letters in dict.fromkeys(near) if allowed(one := Plan(letters, plan.predictor))]
        best = max(fits, key=quality, default=plan)
        if quality(best) <= quality(plan):
            return plan
        plan = best


def neighbours(plan: Plan, letters: Sequence[str]) -> list[Plan]:
    """Every plan one move away: a computing row up to two steps off, another letter at a step, a refresh elsewhere."""
    text, steps, found = plan.letters, len(plan.letters), []
    for at in range(1, steps):
        if text[at] != NONE:
            found += [
                put(put(text, at, text[to]), to, text[at])
                for to in (at - 2, at - 1, at + 1, at + 2)
                if 0 < to < steps and text[to] != text[at]
            ]
        found += [put(text, at, letter) for letter in letters if letter != text[at]]
        if text[at] != FULL:
            found += [
                put(put(text, other, NONE), at, FULL)
                for other in range(1, steps)
                if text[other] == FULL and abs(other - at) > 2
            ]
    return [Plan(one, plan.predictor) for one in dict.fromkeys(found)]


def put(plan: str, at: int, letter: str) -> str:
    return plan[:at] + letter + plan[at + 1 :]
