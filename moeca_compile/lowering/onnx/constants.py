"""Weights as constants of a graph, in the form in which they are used.

A runtime that finds a Transpose or a Split of a constant computes it when it loads, into a copy of its own, for each
variant. What is computed from weights alone is computed here, so that it lies in the one file.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.onnx.origins import Origin, of_call, of_parameter, origins_of
from moeca_compile.lowering.onnx.quantized.forms import VALUES
from moeca_compile.lowering.onnx.request import OnnxRequest
from moeca_compile.runtime.bundle.refit.recipes import Permute

SMALL = 1 << 16  # elements: as many may come out of less


def bind_weights(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """Placeholders that are weights become attributes of the graph. Does nothing where the model has no weights."""
    body = next(node for node in gm.graph.nodes if node.op != "placeholder")
    for node in fx.placeholders(gm):
        if node.name in request.weights:
            # NOTE: buffers, not the parameters themselves: those may carry attributes and hooks of the model's
            weight = request.weights[node.name]
            origin = of_parameter(request.parameters.get(node.name), weight)
            _attribute(gm, node, weight.detach(), body, origin)
    return gm


def fold_constants(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """What follows from constants alone becomes a constant. Does nothing where no operator reads constants alone."""
    known: dict[Node, Any] = {
        node: operator.attrgetter(str(node.target))(gm) for node in gm.graph.nodes if node.op == "get_attr"
    }
    by_attribute = origins_of(gm)
    origins = {node: by_attribute.get(str(node.target), Origin()) for node in known}
    run = torch.fx.Interpreter(gm, garbage_collect_values=False)
    run.env = dict(known)
    for node in list(gm.graph.nodes):
        sources = node.all_input_nodes
        if node.op == "call_function" and sources and known.keys() >= set(sources) and _may_fold(node):
            known[node] = run.env[node] = run.run_node(node)
            origins[node] = of_call(node, origins)
    for node in list(known):
        used = [user for user in node.users if user not in known]
        if used and node.op == "call_function" and isinstance(known[node], torch.Tensor):
            _attribute(gm, node, known[node].detach().contiguous(), node, origins[node])
    return gm


def _may_fold(node: Node) -> bool:
    """Whether the result is always the same, and not larger than what it is made of: a mask or an expand may be a whole
    image's."""
    stays = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or node.target in VALUES
    return not stays and _elements(fx.value(node)) <= max(
        _elements([fx.value(one) for one in node.all_input_nodes]), SMALL
    )


def _elements(values: Any) -> int:
    return sum(one.numel() for one in tree_leaves(values) if isinstance(one, torch.Tensor))


def transpose_linears(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """linear(x, W, b) -> x @ W^T + b with W^T in the file, where ONNX has no operator that transposes by itself (Gemm
    does, for two dimensions). Does nothing where every linear reads two dimensions."""
    origins = origins_of(gm)
    for node in list(gm.graph.nodes):
        if node.target is not aten.linear.default or len(fx.shape(fx.arg(node, 0))) == 2:
            continue
        weight = fx.arg(node, 1)
        if weight.op != "get_attr":
            continue
        name = f"{weight.target}_transposed"
        if not hasattr(gm, name):
            gm.register_buffer(name, getattr(gm, str(weight.target)).t().contiguous())
            origin = origins.get(str(weight.target), Origin())
            recipe = None if origin.recipe is None else Permute(origin.recipe, (1, 0))
            origins[name] = Origin(origin.parameters, recipe)
        with gm.graph.inserting_before(node):
            product = gm.graph.call_function(aten.matmul.default, (fx.arg(node, 0), gm.graph.get_attr(name)))
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            if bias is not None:
                product = gm.graph.call_function(aten.add.Tensor, (product, bias))
        node.replace_all_uses_with(product)
        gm.graph.erase_node(node)
    return gm


def _attribute(gm: GraphModule, node: Node, value: torch.Tensor, before: Node, origin: Origin) -> Node:
    """`value` as a buffer, read in place of `node`."""
    name = f"{node.name}_" if hasattr(gm, node.name) else node.name
    gm.register_buffer(name, value)
    origins_of(gm)[name] = origin
    with gm.graph.inserting_before(before):
        read = gm.graph.get_attr(name)
    read.meta = dict(node.meta)
    node.replace_all_uses_with(read)
    if node.op == "placeholder":
        gm.graph.erase_node(node)
    return read


def drop_unread(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """Drop operators and constants that nothing reads. Does nothing where there are none."""
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not fx.has_effect(node):
            gm.graph.erase_node(node)
    gm.delete_all_unused_submodules()
    return gm
