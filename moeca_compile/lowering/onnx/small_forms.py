"""Operators that torch takes and ONNX doesn't, or takes otherwise."""

from __future__ import annotations

from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.experts.rewrite import rewrite_experts
from moeca_compile.lowering.onnx.request import OnnxRequest
from moeca_compile.passes.verify import changes_outputs

ATTENTION = 23  # the first opset with the operator


def drop_squeezes(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """torch's squeeze leaves a dimension that isn't 1 as it is; ONNX's refuses the model.

    Does nothing where every squeezed dimension is 1.
    """
    for node in list(gm.graph.nodes):
        if node.target not in (aten.squeeze.dim, aten.squeeze.dims):
            continue
        source, named = fx.arg(node, 0), node.args[1]
        sizes = fx.shape(source)
        dims = [named] if isinstance(named, int) else list(named)
        ones = [dim for dim in dims if sizes[dim] == 1]
        if len(ones) == len(dims):
            continue
        if ones:
            node.target, node.args = aten.squeeze.dims, (source, ones)
        else:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
    return gm


@changes_outputs
def write_experts(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """Routed experts in the form asked for; with a capacity the graph also gives the count of dropped branches.

    Does nothing where there are none, or where they stay the calls that they are ("segments").
    """
    rewrite_experts(gm, request.experts)
    return gm


def spread_masks(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """torch and ONNX spread an attention's mask over the queries and keys; onnxruntime's operator refuses to.

    Before: an attention with a mask [B, 1, 1, S].  After: with one [B, 1, L, S], for L queries and S keys.
    Does nothing below opset 23, where attentions are written out, and where a mask has an entry for each pair.
    """
    masked = [node for node in gm.graph.nodes if request.opset >= ATTENTION and node.target is fx.SDPA]
    for node in masked:
        given = fx.arguments_of(node)
        mask, pairs = given.get("attn_mask"), [fx.shape(given[name])[-2] for name in ("query", "key")]
        if mask is None or list(fx.shape(mask)[-2:]) == pairs:
            continue
        with gm.graph.inserting_before(node):
            spread = fx.call(gm, aten.expand.default, (mask, [-1] * (len(fx.shape(mask)) - 2) + pairs), like=node)
        node.replace_input_with(mask, spread)
    return gm


def loosen_views(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """A view was legal for the strides of the capture. What was rewritten since may give others; ONNX has none.

    Does nothing where there are no views.
    """
    for node in gm.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    return gm
