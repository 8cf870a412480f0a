"""Drop what nothing reads any more, inputs too: only now, after `insert_state`, are the skipped regions dead.

Before: a graph with state in and out.  After: the nodes that the row really needs. Nothing after lowering may do this.
Does nothing where everything is read.
"""

from __future__ import annotations

from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.passes.facts import RewriteRequest


def drop_dead(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    gm.graph.eliminate_dead_code(fx.has_effect)
    for node in fx.placeholders(gm):
        if not node.users:
            gm.graph.erase_node(node)
    return gm
