"""THE ORACLE: what a schedule means, said as plainly as possible.

It runs every node of the captured graph at every step, and then replaces the outputs of the regions that the row
doesn't compute by what the rules say. It knows nothing of the passes that make variants, of slots or of the runtime.
What is recomputed in part is decided in `reference_parts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from moeca_compile.graph.regions import RegionMap
from moeca_compile.passes.partial.parts import block_of
from moeca_compile.schedule import Action, Partial, Row, Schedule
from tests.reference_parts import Branches, Tokens, most_due

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


def weighed(history: Sequence[Computed], weights: Sequence[float]) -> Tensor:
    """w0 y0 + w1 y1 + ..., the last computed value first, at least in float32."""
    values = [value for _, value in reversed(history)][: len(weights)]
    wide = torch.promote_types(values[0].dtype, torch.float32)
    terms = [value.to(wide) * number(weight) for value, weight in zip(values, weights, strict=False)]
    return sum(terms[1:], terms[0]).to(values[0].dtype)


def number(value: float) -> Tensor:
    """Distances and their inverses are float32 numbers: that is how they reach every target."""
    return torch.tensor(value, dtype=torch.float32)


class Reference(Interpreter):
    """One trajectory of one captured graph; call it once a step.

    Args:
        gm: the captured graph; it isn't changed.
        regions: which of its nodes may be replaced.
        schedule: fitted to them; its order, its weights, its control, and which regions age item by item count here.
        extrapolate: the arithmetic of FORECAST; another one says the same, but rounds elsewhere.
    """

    def __init__(
        self, gm: GraphModule, regions: RegionMap, schedule: Schedule, extrapolate: Forecast = forecast
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)  # bases are read late
        self.order, self.extrapolate, self.control = schedule.order, extrapolate, schedule.control
        self.fitted = schedule.fitted
        self.step = -1
        self.row: Row = ()
        aging = {column for column in range(len(regions)) if schedule.partials(column)}
        whole = [(column, region) for column, region in enumerate(regions) if column not in aging]
        self.region_of = {name: column for column, region in whole for name in region.outputs}
        self.base_of = {cut.node: cut.base for _, region in whole for cut in region.cuts if cut.base}
        self.node_of = {node.name: node for node in gm.graph.nodes}
        self.history: dict[str, list[Computed]] = {name: [] for name in self.region_of}  # by output, oldest first
        self.aging = {column: regions.regions[column] for column in sorted(aging)}
        self.part_of = {part.node: column for column, r in self.aging.items() for part in r.divisible().parts}
        self.key_of = {key.node: column for column, r in self.aging.items() for key in r.divisible().keys}
        self.tokens = {name: Tokens(self.order, forecast) for name in self.part_of}
        self.keys: dict[str, Tensor] = {}
        self.branches: dict[int, Branches] = {}
        self.branches_at: dict[str, int] = {}  # the node that weights the branches
        for column, region in self.aging.items():
            if (branches := region.divisible().branches) is not None:
                tables = {name: table.get(region.key) for name, table in self.control.tables.items()}
                self.branches[column] = Branches(self.order, forecast, self.control, **tables)
                experts = self.node_of[branches.value.node]
                self.branches_at[next(iter(experts.users)).name] = column
        self.chosen: dict[tuple[str, int], set[tuple[int, int]]] = {}

    def __call__(self, row: Row, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """The model's outputs at the next step, with these actions."""
        self.step += 1
        self.row = row
        self.chosen.clear()
        with torch.no_grad():
            return tuple(self.run(*args))

    def run_node(self, n: Node) -> Any:
        if n.name in self.branches_at:  # before it reads them
            self._route(self.branches_at[n.name])
        value = super().run_node(n)
        if n.name in self.key_of:
            return self._key(n.name, self.key_of[n.name], value)
        if n.name in self.part_of:
            return self._tokens(n.name, self.part_of[n.name], value)
        if n.name not in self.region_of:
            return value
        action = self.row[self.region_of[n.name]]
        history = self.history[n.name]
        base = self.env[self.node_of[self.base_of[n.name]]] if n.name in self.base_of else None
        if action is Action.COMPUTE:
            history.append((self.step, value.clone() if base is None else value - base))
            return value
        weights = () if self.fitted is None else self.fitted.weights[self.step][self.region_of[n.name]]
        if action is Action.REUSE:
            kept = history[-1][1]
        elif weights:
            kept = weighed(history, weights)
        else:
            kept = self.extrapolate(history, self.step, self.order)
        return kept if base is None else base + kept

    # -- regions that age item by item ------------------------------------------------------------------------------

    def _recomputed(self, column: int) -> set[tuple[int, int]]:
        """(sample, token) of what a row computes of a region."""
        act, region = self.row[column], self.aging[column]
        info = region.divisible()
        if act is Action.COMPUTE:
            return {(b, n) for b in range(info.batch) for n in range(info.tokens)}
        if not isinstance(act, Partial) or not act.rho:
            return set()
        block, count = block_of(region.key), act.tokens(info.tokens)
        if (block, count) not in self.chosen:
            experts = next((c for c in self.branches if block_of(self.aging[c].key) == block), None)
            weigh = None if experts is None else self.branches[experts].token_due
            if info.enters is None:
                assert weigh is not None
                assert info.branches is not None
                scores = self.env[self.node_of[info.branches.scores]].reshape(info.batch, info.tokens, -1)
                due = {at: weigh(self.step, at, True, scores) for at in self.branches[column].slots}
            else:
                entering = self.env[self.node_of[info.enters.node]]
                due = self.tokens[info.parts[0].node].due(self.step, self.control, entering)
                if weigh is not None:
                    due = {at: one * weigh(self.step, at, False) for at, one in due.items()}
            self.chosen[block, count] = most_due(due, count)
        return self.chosen[block, count]

    def _tokens(self, name: str, column: int, value: Tensor) -> Tensor:
        info = self.aging[column].divisible()
        entering = None
        if info.enters is not None and self.control.score == "drift":
            entering = self.env[self.node_of[info.enters.node]]
        full = value.reshape(info.batch, info.tokens, -1)
        copy = self.row[column] is Action.REUSE
        return self.tokens[name].value(self.step, full, self._recomputed(column), copy, entering).view_as(value)

    def _key(self, name: str, column: int, value: Tensor) -> Tensor:
        """Keys and values of the recomputed tokens among those of the others as they were last."""
        kept = self.keys.get(name, value).clone()
        for b, n in self._recomputed(column):
            kept[b, :, n] = value[b, :, n]
        self.keys[name] = kept
        return kept

    def _route(self, column: int) -> None:
        info, act = self.aging[column].divisible(), self.row[column]
        branches = info.branches
        assert branches is not None
        node = self.node_of[branches.value.node]
        items = (info.batch, info.tokens)
        ids, gates, scores = (
            self.env[one].reshape(*items, -1)
            for one in (node.args[1], self.node_of[branches.gates], self.node_of[branches.scores])
        )
        full = self.env[node]
        extra = act.branches(ids[0].numel()) if isinstance(act, Partial) else 0
        everything = act is Action.COMPUTE
        tokens = set() if everything else self._recomputed(column)
        found = self.branches[column].value(
            self.step, full.reshape(branches.value.shape), ids, gates, scores, tokens, extra, everything,
            act is Action.REUSE,
        )  # fmt: skip
        self.env[node] = found.view_as(full)
