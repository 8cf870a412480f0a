"""The values inside one call of a captured model: the branches of a MoE layer, read off its graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeca_compile.engine.program import Program
from moeca_compile.graph import fx
from moeca_compile.graph.autocast import autocast_is
from moeca_compile.graph.regions import ExpertsInfo, Region

Values = dict[torch.fx.Node, Any]


@dataclass(frozen=True)
class Reading:
    """One call of one MoE layer. T tokens of all samples, K branches a token, D channels; float32.

    Attributes:
        ids: [T, K] int64, the experts.
        gates: [T, K], what the sum weighs each branch with.
        y: [T, K, D], the branches before that.
        rest: [T, D], what the layer gives beside its routed sum, such as shared experts.
        experts: how many there are.
    """

    ids: Tensor
    gates: Tensor
    y: Tensor
    rest: Tensor
    experts: int

    @property
    def routed(self) -> Tensor:
        """[T, D], the gate-weighted sum."""
        return (self.gates.unsqueeze(-1) * self.y).sum(dim=1)

    def part(self, expert: int) -> Tensor:
        """[T, D], what one expert adds to it."""
        mine = self.gates * (self.ids == expert)
        return (mine.unsqueeze(-1) * self.y).sum(dim=1)


class RoutedLayer:
    """Where the branches of a region's experts are in its graph."""

    def __init__(self, program: Program, region: Region, info: ExpertsInfo) -> None:
        self.gm = program.analysis.gm
        self.region, self.info = region, info
        (self.node,) = fx.resolve(self.gm, (info.node,))
        (self.ids,) = fx.resolve(self.gm, (info.ids,))
        (self.output,) = fx.resolve(self.gm, region.outputs[:1])
        self.experts = sum(1 for _ in fx.nodes_of(self.node.args[2]))  # `up`: a weight each
        inside = {*region.body, self.output.name}
        self.tail: list[torch.fx.Node] = []  # from the branches to the output
        below = {self.node}
        for one in self.gm.graph.nodes:
            if one.name in inside and any(source in below for source in one.all_input_nodes):
                self.tail.append(one)
                below.add(one)
        sources = {source for one in self.tail for source in one.all_input_nodes}
        self.needs = {self.node, self.ids, self.output} | (sources - below)

    def read(self, values: Values) -> Reading | None:
        """Of the values of `needs`; None where the output isn't one sum a token."""
        y = values[self.node]
        ids = values[self.ids].reshape(y.shape[:2])
        with autocast_is(()), torch.no_grad():
            rest = self._outcome(torch.zeros_like(y), values).float()
            if rest.numel() != y.shape[0] * y.shape[2]:
                return None
            gates = []
            for slot in range(y.shape[1]):  # the sum is linear in y: ones in one slot show that slot's gate
                ones = torch.zeros_like(y)
                ones[:, slot] = 1
                change = self._outcome(ones, values).float() - rest
                gates.append(change.reshape(y.shape[0], y.shape[2]).mean(dim=1))
        rest = rest.reshape(y.shape[0], y.shape[2])
        return Reading(ids, torch.stack(gates, dim=1), y.float(), rest, self.experts)

    def _outcome(self, y: Tensor, values: Values) -> Tensor:
        """The region's output if the experts had given `y`."""
        found: Values = {self.node: y}
        interpreter = torch.fx.Interpreter(self.gm)
        for one in self.tail:
            interpreter.env = {
                source: found[source] if source in found else values[source] for source in one.all_input_nodes
            }
            found[one] = interpreter.run_node(one)
        output: Tensor = found[self.output] if self.output in found else values[self.output]
        return output


def values_of(program: Program, args: Sequence[Any], wanted: Iterable[torch.fx.Node]) -> Values:
    """These nodes' values in a call with `args`; all others are dropped once they have been used."""
    taps = _Taps(program.analysis.gm, set(wanted))
    with autocast_is(()), torch.no_grad():
        taps.run(*in_graph_order(program, args))
    return taps.kept


def in_graph_order(program: Program, args: Sequence[Any]) -> list[Any]:
    """A call's `args` as the graph's placeholders stand."""
    positions = {one.name: i for i, one in enumerate(program.analysis.facts.inputs)}
    return [args[positions[node.name]] for node in fx.placeholders(program.analysis.gm)]


class _Taps(torch.fx.Interpreter):
    def __init__(self, gm: torch.fx.GraphModule, wanted: set[torch.fx.Node]) -> None:
        super().__init__(gm)
        self.wanted, self.kept = wanted, Values()

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = value
        return value
