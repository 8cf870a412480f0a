"""Write the row's decision on the node at each region's cut: one mark, which later passes only read.

Before: a normalized graph.  After: the same graph with marks, so that what will happen can be printed first.
"""

from __future__ import annotations

from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.passes.facts import RewriteRequest


def tag_row(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    for column, (region, action) in enumerate(zip(request.facts.regions, request.row, strict=True)):
        for output, node in enumerate(fx.resolve(gm, region.outputs)):
            fx.set_mark(node, fx.Mark(column, output, action))
    return gm
