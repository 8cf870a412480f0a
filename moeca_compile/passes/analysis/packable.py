"""Whether the experts' weights in a graph may be packed: only where the operator gets the parameters themselves.

What a cast or a sum makes of a parameter is another tensor at every call; nobody could tell whether a packed copy of it
is still right.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.capture import Input
from moeca_compile.graph.fx import aten

_ALIASES = fx.PARTS | {
    aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.t.default, aten.transpose.int, aten.permute.default, aten.alias.default, aten.detach.default,
}  # fmt: skip


def why_not_packed(gm: GraphModule, inputs: Sequence[Input]) -> str:
    """'' where all may be."""
    weights = {entry.name for entry in inputs if entry.is_weight}
    layers = [node for node in gm.graph.nodes if fx.is_experts(node)]
    if not layers:
        return "the graph has no moeca::experts"
    for node in layers:
        for group in node.args[2:]:
            for weight in fx.nodes_of(group):
                source = fx.strip(weight, lambda node: node.target in _ALIASES)
                if source.name not in weights:
                    return f"{node.name} computes with {source.name}, which isn't a parameter: it is made at each call"
    return ""
