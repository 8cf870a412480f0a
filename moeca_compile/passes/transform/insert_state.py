"""Marked regions -> state: a REUSE reads its region's last output, a FORECAST extrapolates it, a COMPUTE writes it.

Before: a marked graph.  After: placeholders for the state slots that this row reads, and where it forecasts for
`coefficients` [regions, 4] float32; outputs grow by the slots that it writes. The graph stays functional. A region
output with a base is kept as its change from the base. Regions whose tokens or branches are kept one by one are left
to `insert_partial`.
Does nothing where the schedule keeps no state of whole regions.

A forecast is a weighted sum of the last outputs, w0 y0 + w1 y1 + ..., in at least float32. The host gives the weights:
those of the interpolating polynomial on the step index (`schedule/forecast.py`), which depend on steps alone, or fitted
ones (`schedule/fitted.py`). They are 0 where history is missing, which lowers the order by itself. So one graph serves
every step and every fit. Keeping outputs and not divided differences costs less state in bfloat16, and leaves a COMPUTE
nothing to do but hand its output out.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.variant import SLOTS, Slot
from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.transform.ports import Ports
from moeca_compile.schedule import Action


def insert_state(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    if not request.layout:
        return gm
    ports = Ports(gm, request.layout, len(request.facts.regions))
    nodes = {node.name: node for node in gm.graph.nodes}
    for node, mark in fx.marked(gm):
        region = request.facts.regions.regions[mark.region]
        base_name = region.cuts[mark.output].base
        base = nodes[base_name] if base_name else None
        if not ports.has(mark.region, mark.output, Slot.Y0):
            continue
        if mark.action is Action.COMPUTE:
            _write(ports, node, mark, base)
        else:
            _read(ports, node, mark, base)
            node.meta.pop(fx.MARK)
    ports.finish()
    return gm


def _write(ports: Ports, node: Node, mark: fx.Mark, base: Node | None) -> None:
    if base is not None:
        with ports.gm.graph.inserting_before(fx.output_node(ports.gm)):
            node = fx.call(ports.gm, aten.sub.Tensor, (node, base), like=node)
    ports.write(mark.region, mark.output, Slot.Y0, node)


def _read(ports: Ports, node: Node, mark: fx.Mark, base: Node | None) -> None:
    gm = ports.gm
    with gm.graph.inserting_after(node):
        anchor = gm.graph.call_function(aten.alias.default, (node,))  # where the new nodes go
    with gm.graph.inserting_before(anchor):
        forecasts = mark.action is Action.FORECAST
        value = _forecast(ports, node, mark) if forecasts else ports.read(mark.region, mark.output, Slot.Y0)
        if base is not None:
            value = fx.call(gm, aten.add.Tensor, (base, value), like=node)
    gm.graph.erase_node(anchor)
    node.replace_all_uses_with(value)


def _forecast(ports: Ports, node: Node, mark: fx.Mark) -> Node:
    dtype = fx.need(node).dtype
    wide = torch.promote_types(dtype, torch.float32)
    total: Node | None = None
    for age, slot in enumerate(SLOTS):
        if ports.has(mark.region, mark.output, slot):
            output = _as(ports.gm, ports.read(mark.region, mark.output, slot), wide, node)
            term = fx.call(ports.gm, aten.mul.Tensor, (output, ports.weight(mark.region, age)), like=node)
            total = term if total is None else fx.call(ports.gm, aten.add.Tensor, (total, term), like=node)
    assert total is not None
    return _as(ports.gm, total, dtype, node)


def _as(gm: GraphModule, node: Node, dtype: torch.dtype, like: Node) -> Node:
    if fx.need(node).dtype == dtype:
        return node
    return fx.call(gm, aten._to_copy.default, (node,), {"dtype": dtype}, like)
