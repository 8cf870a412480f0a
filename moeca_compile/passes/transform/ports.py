"""A variant's ends: placeholders for the state that it reads, made on first use, and the new state it hands out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.variant import Slot, StateSlot
from moeca_compile.schedule.forecast import MAX_KEPT

COEFFICIENTS = "coefficients"
NOW = "now"


class Ports:
    """Collects what a rewrite reads and writes; `finish` puts the writes among the graph's outputs.

    Args:
        gm: the graph, changed in place.
        layout: the state slots.
        regions: how many rows the table of coefficients has.
    """

    def __init__(self, gm: GraphModule, layout: Sequence[StateSlot], regions: int) -> None:
        self.gm, self.regions = gm, regions
        self.slots = {(slot.region, slot.output, slot.slot): slot for slot in layout}
        self._first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        self._like = next(node for node in gm.graph.nodes if fx.tensor(node) is not None)
        names = {*(slot.name for slot in layout), COEFFICIENTS, NOW}
        self._inputs = {node.name: node for node in fx.placeholders(gm) if node.name in names}
        self._flat_table: Node | None = None
        self._weights: dict[tuple[int, int], Node] = {}
        self._written: list[tuple[str, Node]] = []

    def has(self, region: int, output: int, slot: Slot) -> bool:
        return (region, output, slot) in self.slots

    def of(self, region: int, output: int) -> dict[Slot, Node]:
        """All slots of a region's output, as placeholders."""
        return {slot: self.read(r, o, slot) for r, o, slot in self.slots if (r, o) == (region, output)}

    def read(self, region: int, output: int, slot: Slot) -> Node:
        entry = self.slots[region, output, slot]
        return self._input(entry.name, entry.shape, getattr(torch, entry.dtype), entry.device)

    def now(self) -> Node:
        """step + 1, float32 scalar."""
        return self._input(NOW, (), torch.float32, str(fx.need(self._like).device))

    def weight(self, region: int, age: int) -> Node:
        """One number of the table of coefficients: what a forecast weighs the region's kept value of this age with.

        One operator a number, for a runtime that calls each. A number is read where it is first asked for, so ask in
        the order of the graph.
        """
        if self._flat_table is None:
            device = str(fx.need(self._like).device)
            table = self._input(COEFFICIENTS, (self.regions, MAX_KEPT), torch.float32, device)
            self._flat_table = fx.call(self.gm, aten.view.default, (table, [self.regions * MAX_KEPT]))
        if (region, age) not in self._weights:
            number = region * MAX_KEPT + age
            self._weights[region, age] = fx.call(self.gm, aten.select.int, (self._flat_table, 0, number))
        return self._weights[region, age]

    def write(self, region: int, output: int, slot: Slot, node: Node) -> None:
        """Hand `node` out as the new value of a slot; nothing where the schedule doesn't keep it."""
        entry = self.slots.get((region, output, slot))
        if entry is None:
            return
        last = fx.output_node(self.gm)
        if not fx.need(node).is_contiguous() or node in fx.nodes_of(last.args[0]):
            # an output may be changed in place by the caller; a state has one memory format for all variants
            with self.gm.graph.inserting_before(last):
                node = fx.call(self.gm, aten.clone.default, (node,), {"memory_format": torch.contiguous_format}, node)
        self._written.append((entry.name, node))

    def change(self, region: int, output: int, slots: Iterable[Slot]) -> None:
        """Note that the graph changes these slots in place."""
        names = tuple(self.slots[region, output, slot].name for slot in slots)
        self.gm.meta["moeca_changes"] = (*self.gm.meta.get("moeca_changes", ()), *names)

    def finish(self) -> None:
        """Hand the writes out behind the model's results, together with those of passes before, in order of names."""
        output = fx.output_node(self.gm)
        results = list(output.args[0])  # type: ignore[arg-type]
        names: tuple[str, ...] = self.gm.meta.get("moeca_writes", ())
        self._written += zip(names, results[len(results) - len(names) :], strict=True)
        results = results[: len(results) - len(names)]
        outside = set(self._inputs.values())
        with self.gm.graph.inserting_before(output):
            # a state handed out as it came in could be changed by whoever gets it
            for position, result in enumerate(results):
                if result in outside:
                    results[position] = fx.call(self.gm, aten.clone.default, (result,))
        self._written.sort(key=lambda pair: pair[0])
        output.args = ((*results, *(node for _, node in self._written)),)
        self.gm.meta["moeca_writes"] = tuple(name for name, _ in self._written)

    def _input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Node:
        if name not in self._inputs:
            with self.gm.graph.inserting_before(self._first):
                node = self.gm.graph.placeholder(name)
            with fx.fake_mode_of(fx.need(self._like)):
                node.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
            self._inputs[name] = node
        return self._inputs[name]
