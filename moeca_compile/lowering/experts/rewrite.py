"""`moeca::experts` calls of a graph -> the chosen form of them, in torch's operators over packed weights.

"segments" stays the call that it is: its ONNX form is written in ONNX's own operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.experts import moe
from moeca_compile.lowering.experts.capacity import capacity
from moeca_compile.lowering.experts.choose import Lowering
from moeca_compile.lowering.experts.dense import dense
from moeca_compile.lowering.experts.packing import matrices, vectors


def calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if fx.is_experts(node)]


def why_no_moe(gm: GraphModule) -> str:
    """What keeps `com.microsoft.MoE` from this graph's experts; "" if nothing does."""
    for node in calls(gm):
        x, _, up, down, gate, _, _, _, activation = _arguments(node)
        (hidden, width), out = fx.shape(up[0]), fx.shape(down[0])[0]
        if reason := moe.why_not(fx.need(x).dtype, width, hidden, out, bool(gate), activation):
            return reason
    return ""


def rewrite_experts(gm: GraphModule, lowering: Lowering) -> bool:
    """Replace the calls, in place.

    Returns:
        Whether the graph got one more output, for the count of dropped branches: it has experts of a limited capacity.
    """
    counts: list[Node] = []
    for node in calls(gm) if lowering.name != "segments" else ():
        with gm.graph.inserting_before(node):
            new = _FORMS[lowering.name](gm, node, lowering)
            if lowering.name == "capacity":
                new, count = (gm.graph.call_function(_item, (new, i)) for i in range(2))
                counts.append(count)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    if counts:
        output = fx.output_node(gm)
        with gm.graph.inserting_before(output):
            total = counts[0]
            for count in counts[1:]:
                total = gm.graph.call_function(aten.add.Tensor, (total, count))
        output.args = ((*fx.nodes_of(output.args[0]), total),)
    gm.recompile()
    return bool(counts)


def _item(pair: tuple[Any, ...], place: int) -> Any:
    return pair[place]


def _arguments(node: Node) -> tuple[Any, ...]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
    return tuple(arguments[name] for name in names)


def _batched(gm: GraphModule, node: Node, lowering: Lowering) -> Node:
    x, idx, up, down, gate, up_bias, down_bias, gate_bias, activation = _arguments(node)
    weights = [fx.call(gm, matrices, (weight,)) if weight else None for weight in (up, down, gate)]
    biases = [fx.call(gm, vectors, (bias,)) if bias else None for bias in (up_bias, down_bias, gate_bias)]
    arguments = (x, idx, *weights, *biases, activation)
    if lowering.name == "dense":
        return gm.graph.call_function(dense, arguments)
    return gm.graph.call_function(capacity, (*arguments, lowering.factor.as_integer_ratio()))


def _moe(gm: GraphModule, node: Node, lowering: Lowering) -> Node:
    x, idx, up, down, gate, up_bias, down_bias, gate_bias, activation = _arguments(node)
    weights = fx.call(gm, moe.first, (up, gate)), fx.call(gm, moe.second, (down,))
    fc1_bias = fx.call(gm, moe.first_bias, (up_bias, gate_bias, bool(gate))) if up_bias or gate_bias else None
    fc2_bias = fx.call(gm, moe.second, (down_bias,)) if down_bias else None
    return gm.graph.call_function(moe.moe, (x, idx, *weights, fc1_bias, fc2_bias, bool(gate), activation))


_FORMS: dict[str, Callable[[GraphModule, Node, Lowering], Node]] = {
    "dense": _batched,
    "capacity": _batched,
    "moe": _moe,
}
