"""What a plan costs: sums of what its rows cost, over as many full steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moeca_compile.planner.search.budget import Budget
from moeca_compile.planner.search.rows import FULL, Plan


@dataclass(frozen=True)
class Costs:
    """Of one row by letter: `macs` and, where measured, `ms`; and by predictor the bytes that one stream's cache holds.

    A row's MACs are its program's, so that what no region holds (embeddings, the last layer) is in every row.
    """

    macs: Mapping[str, float]
    ms: Mapping[str, float]
    state_bytes: Mapping[str, int]

    def fraction(self, plan: Plan, kind: str = "macs") -> float:
        """Cost of the plan / cost of as many full steps."""
        each = self.macs if kind == "macs" else self.ms
        return sum(each[letter] for letter in plan.letters) / (each[FULL] * len(plan.letters))

    def state_of(self, plan: Plan) -> int:
        """Bytes of the cache tensors of one stream."""
        return self.state_bytes[plan.predictor] if plan.caches else 0

    def allows(self, plan: Plan, budget: Budget) -> bool:
        """Whether the plan keeps within what the budget limits of work and memory."""
        return (
            (budget.macs is None or self.fraction(plan, "macs") <= budget.macs + 1e-9)
            and (budget.latency is None or self.fraction(plan, "ms") <= budget.latency + 1e-9)
            and (budget.state_bytes is None or self.state_of(plan) <= budget.state_bytes)
        )
