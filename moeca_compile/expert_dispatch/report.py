"""What `prepare` did and what it left alone: plain data that prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moeca_compile.graph.regions import Rejected


@dataclass(frozen=True, slots=True)
class PreparedModule:
    """One MoE module whose dispatch runs as one traceable operator.

    Attributes:
        path: the module's name in the model; "" for the model itself.
        family: which form of dispatch was recognized.
        num_experts: how many routed experts the module has.
        activation: of the experts; "any" where each expert runs its own forward.
        gated: whether an expert multiplies by a gate projection.
        verified: whether the original and the rewritten form were run on this module's own weights and agreed. False on
            the meta device: there, the dispatch and one expert were compared on random stand-ins.
        dense: whether every expert runs on every token, E/K times the routed MACs: the body of an expert is none that
            `moeca::experts` holds, or only branches on masks were rewritten.
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
    """What `prepare` changed and what it left alone. It prints as a list.

    Attributes:
        changed: the modules that this call changed, in module order.
        rejected: what looked like a dispatch and was left alone, with the reason.
        followed: prepared modules whose experts have adapters, or weights that the operator doesn't take (the first is
            named). They run by their own forward, each on every token.
    """

    changed: tuple[PreparedModule, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    followed: tuple[Rejected, ...] = ()

    @property
    def misses(self) -> tuple[Rejected, ...]:
        """The earlier name of `rejected`."""
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
        lines += [f"  followed      {module}: every expert on every token" for module in self.followed]
        lines += [f"  left alone    {miss}" for miss in self.rejected]
        return "\n".join(lines)


def _facts(module: PreparedModule) -> tuple[str, int, str, bool, bool, bool]:
    return module.family, module.num_experts, module.activation, module.gated, module.verified, module.dense
