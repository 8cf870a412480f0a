"""Hoisted values -> inputs: loop-invariant code motion, where the loop is the sampler's.

Before: a variant without dead nodes.  After: a placeholder `hoisted_007` in the place of value 7 of the context's list,
and what only served that value is gone, weights too. The values are computed by prologues: `hand_out` makes one of the
captured graph.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.passes.analysis.count_macs import node_macs
from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.transform.drop_dead import drop_dead
from moeca_compile.passes.verify import changes_outputs

HOISTED = "hoisted_"


def hoist_step_only(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    """Does nothing where no value depends on the timestep alone."""
    return _hoist(gm, request, "step")


def hoist_invariant(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    """Does nothing in the prologue that computes the invariant values, or where there are none."""
    if any(request.facts.hoisted[position].level == "invariant" for position in request.gives):
        return gm
    return _hoist(gm, request, "invariant")


@changes_outputs
def hand_out(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    """Before: the captured graph.  After: it gives the hoisted values `request.gives`, contiguous, and nothing else."""
    output = fx.output_node(gm)
    nodes = fx.resolve(gm, (request.facts.hoisted[position].value for position in request.gives))
    with gm.graph.inserting_before(output):
        output.args = (tuple(node if fx.need(node).is_contiguous() else _contiguous(gm, node) for node in nodes),)
    return gm


def name_of(position: int) -> str:
    return f"{HOISTED}{position:03d}"


def _hoist(gm: GraphModule, request: RewriteRequest, level: str) -> GraphModule:
    before = sum(map(node_macs, gm.graph.nodes))
    nodes = {node.name: node for node in gm.graph.nodes}
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    for position, entry in enumerate(request.facts.hoisted):
        if entry.level == level and entry.value in nodes:
            node, val = nodes[entry.value], fx.need(nodes[entry.value])
            with gm.graph.inserting_before(first):
                shared = gm.graph.placeholder(name_of(position))
            with fx.fake_mode_of(val):
                shared.meta["val"] = torch.empty(val.shape, dtype=val.dtype, device=val.device)
            node.replace_all_uses_with(shared)
    gm = drop_dead(gm, request)
    # these multiplications are done all the same, if not by this program
    gm.meta["moeca_hoisted_macs"] = gm.meta.get("moeca_hoisted_macs", 0) + before - sum(map(node_macs, gm.graph.nodes))
    return gm


def _contiguous(gm: GraphModule, node: torch.fx.Node) -> torch.fx.Node:
    return fx.call(gm, aten.clone.default, (node,), {"memory_format": torch.contiguous_format}, node)
