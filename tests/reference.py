"""THE ORACLE: what a schedule means (DESIGN section 6), said as plainly as possible.

It runs every node of the captured graph at every step, and then replaces the outputs of the regions that the row
doesn't compute by what the rules say. It knows nothing of the passes that make variants, of slots or of the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from moeca_compile.regions import RegionMap
from moeca_compile.schedule import Action, Row

Computed = tuple[int, Tensor]  # the step, and what the region gave
Forecast = Callable[[Sequence[Computed], int, int], Tensor]


def forecast(history: Sequence[Computed], step: int, order: int) -> Tensor:
    """Newton's form of the polynomial through the last `order` + 1 computed values, at `step`.

    y0 + d1 (s - s0) + d2 (s - s0)(s - s1): the divided differences d1 and d2 in float32, their sum at least in float32.
    With too short a history the order is lower.
    """
    *_, (s0, y0) = history
    wide = torch.promote_types(y0.dtype, torch.float32)
    total = y0.to(wide)
    if order >= 1 and len(history) >= 2:
        s1, _ = history[-2]
        d1 = first_difference(history[-2], history[-1])
        total = total + d1 * number(step - s0)
        if order == 2 and len(history) >= 3:
            s2, _ = history[-3]
            d2 = (d1 - first_difference(history[-3], history[-2])) * number(1 / (s0 - s2))
            total = total + d2 * number((step - s0) * (step - s1))
    return total.to(y0.dtype)


def first_difference(older: Computed, newer: Computed) -> Tensor:
    """(y0 - y1) / (s0 - s1), in float32."""
    (s1, y1), (s0, y0) = older, newer
    return (y0.float() - y1.float()) * number(1 / (s0 - s1))


def number(value: float) -> Tensor:
    """Distances and their inverses are float32 numbers: that is how they reach every target."""
    return torch.tensor(value, dtype=torch.float32)


class Reference(Interpreter):
    """One trajectory of one captured graph; call it once a step.

    Args:
        gm: the captured graph; it isn't changed.
        regions: which of its nodes may be replaced.
        order: of FORECAST, 0 to 2.
        extrapolate: the arithmetic of FORECAST; another one says the same, but rounds elsewhere.
    """

    def __init__(self, gm: GraphModule, regions: RegionMap, order: int, extrapolate: Forecast = forecast) -> None:
        super().__init__(gm, garbage_collect_values=False)  # bases are read late
        self.order, self.extrapolate = order, extrapolate
        self.step = -1
        self.row: Row = ()
        self.region_of = {name: column for column, region in enumerate(regions) for name in region.outputs}
        self.base_of = {name: base for r in regions for name, base in zip(r.outputs, r.bases, strict=bool(r.bases))}
        self.node_of = {node.name: node for node in gm.graph.nodes}
        self.history: dict[str, list[Computed]] = {name: [] for name in self.region_of}  # by output, oldest first

    def __call__(self, row: Row, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """The model's outputs at the next step, with these actions."""
        self.step += 1
        self.row = row
        with torch.no_grad():
            return tuple(self.run(*args))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.region_of:
            return value
        action = self.row[self.region_of[n.name]]
        history = self.history[n.name]
        base = self.env[self.node_of[self.base_of[n.name]]] if n.name in self.base_of else None
        if action is Action.COMPUTE:
            history.append((self.step, value.clone() if base is None else value - base))
            return value
        kept = history[-1][1] if action is Action.REUSE else self.extrapolate(history, self.step, self.order)
        return kept if base is None else base + kept
