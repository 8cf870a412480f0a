"""What `prepare` did and what it left alone: plain data that prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moeca_compile.graph.regions import Rejected


@dataclass(frozen=True, slots=True)
class PreparedModule:
    """One MoE module whose dispatch is traced in canonical form.

    `verified` says that original and canonical form were run on this module's own weights and agreed; it is False
    on the meta device, where only the dispatch and one expert's body were compared, on random stand-ins. `dense` says
    that every expert runs on every token, E/K times the routed MACs: its body is none that `moeca::experts` holds, or
    only branches on masks were straightened.
    """

    path: str
    family: str
    num_experts: int
    activation: str
    gated: bool
    verified: bool
    dense: bool = False


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """`changed` holds the modules that this call changed, in module order; `rejected` what looked like a dispatch;
    `followed` the prepared ones whose experts have adapters or quantised weights (the first is named): these experts
    run by their own forward, each on every token."""

    changed: tuple[PreparedModule, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    followed: tuple[Rejected, ...] = ()

    @property
    def misses(self) -> tuple[Rejected, ...]:
        """Earlier name of `rejected`."""
        return self.rejected

    def __str__(self) -> str:
        lines = [f"prepared {len(self.changed)} MoE modules, left {len(self.rejected)} alone"]
        alike = Counter(_facts(c) for c in self.changed)
        for key, count in alike.items():
            family, num_experts, activation, gated, verified, dense = key
            first = next(c.path for c in self.changed if _facts(c) == key)
            body = f"{activation} {'gated' if gated else 'plain'}"
            others = f" and {count - 1} more" if count > 1 else ""
            body = "any body" if activation == "any" else body
            cost = "  every expert on every token" if dense else ""
            check = "" if verified else "  not verified on its own weights"
            lines.append(
                f"  {family:<13} {num_experts:>4} experts  {body:<16} {first or '(root)'}{others}{cost}{check}"
            )
        lines += [f"  followed      {one}: every expert on every token" for one in self.followed]
        lines += [f"  left alone    {miss}" for miss in self.rejected]
        return "\n".join(lines)


def _facts(one: PreparedModule) -> tuple[str, int, str, bool, bool, bool]:
    return one.family, one.num_experts, one.activation, one.gated, one.verified, one.dense
