"""A cache that a skipped region would overwrite in place -> the cache as it is.

Before: a graph with state in and out, whose results after the model's own are new values of caches.  After: where a
region that the row doesn't compute makes such a value, the result is the input itself; so nothing of the region stays.
The next row that computes the region writes the cache before it reads it.
Does nothing where the model writes no cache, or the row computes everything.
"""

from __future__ import annotations

from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.verify import results_of
from moeca_compile.schedule import Action


def keep_caches(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    caches = request.facts.caches
    if not caches:
        return gm
    skipped: set[str] = set()
    for region, action in zip(request.facts.regions, request.row, strict=True):
        if action is not Action.COMPUTE:
            skipped.update(region.body)
    results, inputs = list(fx.nodes_of(fx.output_node(gm).args[0])), {node.name: node for node in fx.placeholders(gm)}
    first = len(results_of(gm)) - len(caches)
    for place, name in enumerate(caches, start=first):
        if results[place].name in skipped:
            results[place] = inputs[name]
    fx.output_node(gm).args = (tuple(results),)
    return gm
