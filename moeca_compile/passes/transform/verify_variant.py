"""Check what a variant promises: its reused regions are gone, its computed ones there, its state as laid out.

Before: a finished variant.  After: the same graph, or an InvariantError that names the region and the node.
"""

from __future__ import annotations

from torch.fx import GraphModule

from moeca_compile.errors import InvariantError
from moeca_compile.graph.variant import Slot
from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.verify import state_problems
from moeca_compile.schedule import Action
from moeca_compile.schedule.action import name_of


def verify_variant(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    gm.graph.lint()
    alive = {node.name for node in gm.graph.nodes}
    actions = list(zip(request.facts.regions, request.row, strict=True))
    branched = {request.facts.regions.keys[slot.region] for slot in request.layout if slot.slot is Slot.HELD}
    needed = {name for region, action in actions if action is Action.COMPUTE for name in region.body}
    for region, action in actions:
        label = name_of(action)
        routed = region.key in branched and action is not Action.COMPUTE  # its combination stays
        missing = [name for name in region.outputs if (name in alive) is (action is not Action.COMPUTE)]
        if missing and not routed:
            state = "still there" if action is not Action.COMPUTE else "gone"
            raise InvariantError(f"region {region.key}: {label}, but its output {missing[0]} is {state}")
        heavy = {a.node for a in region.attention} | {e.node for e in region.experts}
        if action is not Action.COMPUTE and (left := heavy & alive - needed):
            raise InvariantError(f"region {region.key}: {label}, but {sorted(left)} would still run")
    if problem := next(state_problems(gm, request.layout), ""):
        raise InvariantError(problem)
    return gm
