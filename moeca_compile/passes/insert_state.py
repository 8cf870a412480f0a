"""Marked regions -> state: a REUSE reads its region's last output, a FORECAST extrapolates it, a COMPUTE writes it.

Before: a marked graph.  After: placeholders for the state slots that this row reads and, if it forecasts, for
`coefficients` [regions, 2] float32; outputs grow by the slots that it writes. The graph stays functional. With an
empty layout (nothing is ever reused) it does nothing. A region output with a base is kept as its change from the base.

A forecast is Newton's interpolating polynomial on the step index (Stoer & Bulirsch, Introduction to Numerical
Analysis, 2.1.3) through the last outputs: y0 + d1 (s - s0) + d2 (s - s0)(s - s1), with the divided differences
d1 = (y0 - y1)/(s0 - s1) and d2 = (d1 - (y1 - y2)/(s1 - s2))/(s0 - s2). Gathered by differences of outputs it is
y0 + c0 (y0 - y1) + c1 (y1 - y2), where c0 and c1 depend on steps alone: the host computes them (`forecast.py`),
with 0 where history is missing, which lowers the order by itself. Keeping outputs and not d1 and d2 costs less state
in bfloat16, says the same, and leaves a COMPUTE nothing to do but hand its output out.
"""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from moeca_compile import fx
from moeca_compile.fx import aten
from moeca_compile.passes.context import Context
from moeca_compile.regions import RegionMap
from moeca_compile.schedule import Action, Schedule
from moeca_compile.variant import SLOTS, StateSlot

COEFFICIENTS = "coefficients"


def state_layout(regions: RegionMap, schedule: Schedule) -> tuple[StateSlot, ...]:
    """The state that `schedule` (bound to these regions) keeps: each region's last outputs, in its own dtype."""
    slots: list[StateSlot] = []
    for column, region in enumerate(regions):
        outputs = zip(region.shapes, region.dtypes, region.devices, strict=True)
        for output, (shape, dtype, device) in enumerate(outputs):
            size = math.prod(shape) * getattr(torch, dtype).itemsize
            for slot in SLOTS[: schedule.depth(column)]:
                slots.append(StateSlot(f"state_{len(slots):03d}", column, output, slot, shape, dtype, device, size))
    return tuple(slots)


def insert_state(gm: GraphModule, ctx: Context) -> GraphModule:
    if not ctx.layout:
        return gm
    writer = _Writer(gm, ctx)
    for node, mark in fx.marked(gm):
        if mark.action is Action.COMPUTE:
            writer.write(node, mark)
        else:
            writer.read(node, mark)
    writer.finish()
    return gm


class _Writer:
    """Adds placeholders on first use and collects the new outputs."""

    def __init__(self, gm: GraphModule, ctx: Context) -> None:
        self.gm = gm
        self.slots = {(s.region, s.output, s.slot): s for s in ctx.layout}
        nodes = {node.name: node for node in gm.graph.nodes}
        self.bases = {
            (column, output): nodes[base]
            for column, region in enumerate(ctx.regions)
            for output, base in enumerate(region.bases)
        }
        self.table_shape = (len(ctx.regions), len(SLOTS) - 1)
        self.first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        self.inputs: dict[str, Node] = {}
        self.written: list[tuple[str, Node]] = []

    def read(self, node: Node, mark: fx.Mark) -> None:
        with self.gm.graph.inserting_after(node):
            anchor = self.gm.graph.call_function(aten.alias.default, (node,))  # where the new nodes go
        with self.gm.graph.inserting_before(anchor):
            y = self._slot(mark, "y0", node)
            kept = self._forecast(y, node, mark) if mark.action is Action.FORECAST else y
            base = self.bases.get((mark.region, mark.output))
            if base is not None:
                kept = self._call(aten.add.Tensor, base, kept, like=node)
        self.gm.graph.erase_node(anchor)
        node.replace_all_uses_with(kept)
        node.meta.pop("moeca")

    def _forecast(self, y0: Node, node: Node, mark: fx.Mark) -> Node:
        wide = torch.promote_types(fx.need(node).dtype, torch.float32)
        newer = total = self._as(y0, wide, node)
        for column, slot in enumerate(SLOTS[1:]):
            if (mark.region, mark.output, slot) in self.slots:
                older = self._as(self._slot(mark, slot, node), wide, node)
                change = self._call(aten.sub.Tensor, newer, older, like=node)
                part = self._call(aten.mul.Tensor, change, self._coefficient(mark, column, node), like=node)
                total, newer = self._call(aten.add.Tensor, total, part, like=node), older
        return self._as(total, fx.need(node).dtype, node)

    def write(self, node: Node, mark: fx.Mark) -> None:
        slot = self.slots.get((mark.region, mark.output, "y0"))
        if slot is None:
            return
        output = fx.output_node(self.gm)
        base = self.bases.get((mark.region, mark.output))
        with self.gm.graph.inserting_before(output):
            if base is not None:
                node = self._call(aten.sub.Tensor, node, base, like=node)
            if not fx.need(node).is_contiguous() or node in fx.nodes_of(output.args[0]):
                # an output may be changed in place by the caller; a state has one memory format for all variants
                node = self._call(aten.clone.default, node, memory_format=torch.contiguous_format, like=node)
        self.written.append((slot.name, node))

    def finish(self) -> None:
        output = fx.output_node(self.gm)
        own = list(output.args[0])  # type: ignore[arg-type]
        outside = set(self.inputs.values())
        with self.gm.graph.inserting_before(output):
            # a state handed out as it came in could be changed by whoever gets it
            own = [self._call(aten.clone.default, one) if one in outside else one for one in own]
        self.written.sort()
        output.args = ((*own, *(node for _, node in self.written)),)
        self.gm.meta["moeca_writes"] = tuple(name for name, _ in self.written)

    # -- small makers -----------------------------------------------------------------------------------------------

    def _call(self, target: object, *args: object, like: Node | None = None, **kwargs: object) -> Node:
        return fx.call(self.gm, target, args, kwargs, like=like)

    def _as(self, node: Node, dtype: torch.dtype, like: Node) -> Node:
        if fx.need(node).dtype == dtype:
            return node
        return self._call(aten._to_copy.default, node, dtype=dtype, like=like)

    def _slot(self, mark: fx.Mark, slot: str, like: Node) -> Node:
        found = self.slots[mark.region, mark.output, slot]
        return self._input(found.name, found.shape, getattr(torch, found.dtype), like)

    def _coefficient(self, mark: fx.Mark, column: int, like: Node) -> Node:
        table = self._input(COEFFICIENTS, self.table_shape, torch.float32, like)
        row = self._call(aten.select.int, table, 0, mark.region)
        return self._call(aten.select.int, row, 0, column)

    def _input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Node) -> Node:
        if name not in self.inputs:
            with self.gm.graph.inserting_before(self.first):
                node = self.gm.graph.placeholder(name)
            with fx.fake_mode_of(fx.need(like)):
                node.meta["val"] = torch.empty(shape, dtype=dtype, device=fx.need(like).device)
            self.inputs[name] = node
        return self.inputs[name]
