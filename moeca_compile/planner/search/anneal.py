"""Simulated annealing on the estimated quality: thousands of plans per second, without any rollout.

Source: Kirkpatrick, Gelatt & Vecchi, Optimization by Simulated Annealing, Science 220 (1983).
"""

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
    """The best allowed plan on a random walk that accepts worse plans less and less often.

    Args:
        start: an allowed plan.
        letters: the row kinds that the plan may use.
        quality: of a plan, dB.
        allowed: whether a plan fits the budget.
        moves: proposed, in total.
        heat: the temperature at the start, dB: about what one move may lose.
        seed: of the random numbers.

    Returns:
        The best plan of the walk.
    """
    generator = random.Random(seed)
    current = best = start
    current_quality = best_quality = quality(start)
    for move in range(moves):
        moved = _moved(current.letters, letters, generator)
        if moved is None:
            continue
        plan = Plan(moved, current.predictor)
        if not allowed(plan):
            continue
        plan_quality = quality(plan)
        temperature = heat * (1 - move / moves) ** 2 + 1e-3
        better = plan_quality >= current_quality
        if better or generator.random() < math.exp((plan_quality - current_quality) / temperature):
            current, current_quality = plan, plan_quality
            if plan_quality > best_quality:
                best, best_quality = plan, plan_quality
    return best


def _moved(plan: str, letters: Sequence[str], generator: random.Random) -> str | None:
    """The letters after one random move; the first step stays computed. None: the move changes nothing."""
    steps = len(plan)
    step = generator.randrange(1, steps) if steps > 1 else 0
    kind = generator.random()
    if kind < 0.6:  # move a row that computes something by one or two steps
        computing = [step for step in range(1, steps) if plan[step] != NONE]
        if not computing:
            return None
        step = generator.choice(computing)
        other = step + generator.choice((-2, -1, 1, 2))
    elif kind < 0.8:  # exchange two rows
        other = generator.randrange(1, steps)
    else:  # change one row, and perhaps another one to pay for it
        changed = replaced(plan, step, generator.choice(letters))
        if generator.random() < 0.7:
            changed = replaced(changed, generator.randrange(1, steps), generator.choice(letters))
        return None if changed == plan else changed
    if not 0 < other < steps or plan[step] == plan[other]:
        return None
    return _exchanged(plan, step, other)


def polish(plan: Plan, quality: Callable[[Plan], float], allowed: Callable[[Plan], bool]) -> Plan:
    """Compute one more row, or exchange two consecutive rows, as long as the quality rises."""
    while True:
        text = plan.letters
        changed = [replaced(text, step, FULL) for step in range(1, len(text))]
        changed += [_exchanged(text, step, step + 1) for step in range(1, len(text) - 1)]
        plans = [Plan(letters, plan.predictor) for letters in dict.fromkeys(changed)]
        best = max(filter(allowed, plans), key=quality, default=plan)
        if quality(best) <= quality(plan):
            return plan
        plan = best


def neighbors(plan: Plan, letters: Sequence[str]) -> list[Plan]:
    """Every plan one move away.

    A move takes a computing row up to two steps earlier or later, puts another letter at a step, or takes a full row to
    a distant step.
    """
    text, steps = plan.letters, len(plan.letters)
    changed: list[str] = []
    for step in range(1, steps):
        if text[step] != NONE:
            near = [other for other in (step - 2, step - 1, step + 1, step + 2) if 0 < other < steps]
            changed += [_exchanged(text, step, other) for other in near if text[other] != text[step]]
        changed += [replaced(text, step, letter) for letter in letters if letter != text[step]]
        if text[step] != FULL:
            distant = [other for other in range(1, steps) if text[other] == FULL and abs(other - step) > 2]
            changed += [replaced(replaced(text, other, NONE), step, FULL) for other in distant]
    return [Plan(text, plan.predictor) for text in dict.fromkeys(changed)]


def replaced(letters: str, step: int, letter: str) -> str:
    """The letters with another one at `step`."""
    return letters[:step] + letter + letters[step + 1 :]


def _exchanged(letters: str, step: int, other: int) -> str:
    return replaced(replaced(letters, step, letters[other]), other, letters[step])
