"""The cost of a plan: the sum over its rows, relative to as many full steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moeca_compile.planner.search.rows import FULL, Plan
from moeca_compile.schedule.budget import Budget


@dataclass(frozen=True)
class Costs:
    """The cost of each row kind and predictor.

    Attributes:
        macs: by letter, the MACs of one row. They are the MACs of its variant, so every row includes what lies outside
            the regions (embeddings, the last layer).
        ms: by letter, milliseconds of one row; empty if it was not measured.
        state_bytes: by predictor, bytes of the cache of one guidance stream.
        full_steps: steps that are computed in full whatever the plan says, because another transformer takes over.
    """

    macs: Mapping[str, float]
    ms: Mapping[str, float]
    state_bytes: Mapping[str, int]
    full_steps: frozenset[int] = frozenset()

    def fraction(self, plan: Plan, kind: str = "macs") -> float:
        """The cost of the plan as a fraction of that of as many full steps; `kind`: `macs` or `ms`."""
        row_costs = self.macs if kind == "macs" else self.ms
        letters = [FULL if step in self.full_steps else letter for step, letter in enumerate(plan.letters)]
        return sum(row_costs[letter] for letter in letters) / (row_costs[FULL] * len(letters))

    def state_of(self, plan: Plan) -> int:
        """Bytes of the cache tensors of one guidance stream."""
        return self.state_bytes[plan.predictor] if plan.caches else 0

    def allows(self, plan: Plan, budget: Budget) -> bool:
        """Whether the plan is within the limits of MACs, time and state."""
        return (
            (budget.macs is None or self.fraction(plan, "macs") <= budget.macs + 1e-9)
            and (budget.latency is None or self.fraction(plan, "ms") <= budget.latency + 1e-9)
            and (budget.state_bytes is None or self.state_of(plan) <= budget.state_bytes)
        )
