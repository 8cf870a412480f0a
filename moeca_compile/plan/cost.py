"""What a plan costs. A plan is a string with one letter a step: which kind of row runs there.

`C` computes every region, `A` the attention regions only (the cheapest quality there is: attention is a small part of
a DiT-MoE's work and a large part of a forecast's error), `F` forecasts (or, with order 0, reuses) all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeca_compile.plan.budget import Budget
from moeca_compile.schedule import Action, Row, Schedule


@dataclass(frozen=True)
class Costs:
    """Of one row by letter: `macs` and, where measured, `ms`; and the bytes that the cache of one stream holds."""

    macs: Mapping[str, float]
    ms: Mapping[str, float]
    state_bytes: int

    def fraction(self, plan: str, kind: str = "macs") -> float:
        """Cost of the plan / cost of as many full steps."""
        each = self.macs if kind == "macs" else self.ms
        return sum(each[letter] for letter in plan) / (each["C"] * len(plan))

    def allows(self, plan: str, budget: Budget) -> bool:
        """Whether the plan keeps within what the budget limits of work and memory."""
        return (
            (budget.macs is None or self.fraction(plan, "macs") <= budget.macs + 1e-9)
            and (budget.latency is None or self.fraction(plan, "ms") <= budget.latency + 1e-9)
            and (budget.state_bytes is None or set(plan) == {"C"} or self.state_bytes <= budget.state_bytes)
        )


def row_of(letter: str, kinds: Sequence[str], order: int) -> Row:
    """The actions of one row kind, for regions of these kinds."""
    kept = Action.FORECAST if order else Action.REUSE
    computed = {"C": set(kinds), "A": {"attention"}, "F": set()}[letter]
    return tuple(Action.COMPUTE if kind in computed else kept for kind in kinds)


def schedule_of(plan: str, keys: Sequence[str], kinds: Sequence[str], order: int, made_by: str = "") -> Schedule:
    """The plan as a schedule with exactly its rows."""
    caches = set(plan) != {"C"}
    return Schedule(
        rows=tuple(row_of(letter, kinds, order) for letter in plan),
        regions=tuple(keys),
        order=order if caches else 0,
        made_by=made_by,
    )
