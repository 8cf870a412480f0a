"""Regions that some row recomputes in part keep their tokens and branches one by one, each with its own age.

Before: a marked graph.  After: what this row doesn't compute of them is read from state and forecast, what it computes
is written; see `insert_tokens` for attentions and mlps, `insert_branches` for experts. They are one pass, for the
regions of a block share the choice of their tokens.
Does nothing where no row of the schedule is PARTIAL.
"""

from __future__ import annotations

from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.variant import Slot
from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.partial.insert_branches import insert_branches
from moeca_compile.passes.partial.insert_tokens import insert_tokens
from moeca_compile.passes.partial.parts import Parts
from moeca_compile.passes.transform.ports import Ports
from moeca_compile.schedule import Action


def insert_partial(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    aging = {
        slot.region: slot.slot for slot in request.layout if slot.slot in (Slot.AT, Slot.HELD) and slot.region >= 0
    }
    if not aging:
        return gm
    ports = Ports(gm, request.layout, len(request.facts.regions))
    parts = Parts(gm, request, ports)
    for node, mark in fx.marked(gm):
        if mark.region not in aging:
            continue
        insert = insert_branches if ports.has(mark.region, 0, Slot.HELD) else insert_tokens
        insert(parts, mark)
        if mark.action is not Action.COMPUTE:
            node.meta.pop(fx.MARK)
    ports.finish()
    fx.resort(gm)
    return gm
