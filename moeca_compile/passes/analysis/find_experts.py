"""MoE layers in canonical form: `moeca::experts` calls, and the router that feeds each one.

Before: routers.  After: one `ExpertsInfo` a call; branches can be told apart there. Experts in another form (einsum,
grouped_mm, all on all tokens) have a router and no call: their layer is cached as a whole.
Does nothing where the graph has no such call.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.regions import ExpertsInfo, Rejected
from moeca_compile.passes.facts import Facts


def find_experts(gm: GraphModule, facts: Facts) -> Facts:
    experts: list[ExpertsInfo] = []
    rejected = list(facts.rejected)
    for node in gm.graph.nodes:
        if not fx.is_experts(node):
            continue
        ids = fx.arg(node, 1)
        router = next((info for info in facts.routers if node.name in info.steers), None)
        experts.append(ExpertsInfo(node.name, ids.name, router))
        if router is None:
            reason = "no router found for its expert ids: no branch cache for it"
            rejected.append(Rejected(reason, node.name, fx.where(node), fx.code(node)))
    return replace(facts, experts=tuple(experts), rejected=tuple(rejected))
