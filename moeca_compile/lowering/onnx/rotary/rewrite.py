"""Products and sums that are a rotary embedding become `RotaryEmbedding`, an operator of opset 23."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.onnx.request import OnnxRequest
from moeca_compile.lowering.onnx.rotary.elements import Elements
from moeca_compile.lowering.onnx.rotary.find import Rotations
from moeca_compile.lowering.onnx.rotary.forms import half_of, turned
from moeca_compile.lowering.onnx.rotary.proof import Half, Rotation

OPSET = 23


def write_rotary(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """Before: x * cos + partner(x) * sin, however it is written.  After: one call.

    Does nothing below opset 23, and where it isn't proven that both members of a pair are turned by the same angle.
    """
    if request.opset < OPSET:
        return gm
    rotations, halves = Rotations(Elements(request.hoisted)), dict[tuple[object, ...], Node]()
    for node in list(gm.graph.nodes):
        rotation = rotations.at(node)
        if rotation is None:
            continue
        with gm.graph.inserting_before(node):
            tables = []
            for half in (rotation.cos, rotation.sin):
                key = half.labels.shape, half.labels.numpy().tobytes()  # equal blocks turn by the same angles
                if key not in halves:
                    halves[key] = _write_half(gm, half, rotation)
                tables.append(halves[key])
            layout, last = rotation.layout, fx.shape(node)[rotation.layout.rank :]
            node.replace_all_uses_with(fx.call(gm, turned, (rotation.x, *tables, layout, last), like=node))
    return gm


def _write_half(gm: GraphModule, half: Half, rotation: Rotation) -> Node:
    table = half.table
    if fx.need(table).is_complex():
        table = fx.call(gm, aten.view_as_real.default, (table,), like=table)
    found = fx.call(gm, half_of, (table, rotation.x, half.place, rotation.layout), like=table)
    return found if half.sign == 1 else fx.call(gm, aten.neg.default, (found,), like=table)
