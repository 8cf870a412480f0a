"""The expert branches of MoE layers in one call of a captured model, read from its graph."""

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
    """One call of one MoE layer. T tokens of all samples, K branches per token, D channels; float32.

    Attributes:
        ids: [T, K] int64, the expert of each branch.
        gates: [T, K], the weight of each branch in the routed sum.
        y: [T, K, D], the branches before gate weighting.
        rest: [T, D], the output of the layer without its routed sum, such as shared experts.
        experts: their number.
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
        """[T, D], the contribution of one expert to the routed sum."""
        gates = self.gates * (self.ids == expert)
        return (gates.unsqueeze(-1) * self.y).sum(dim=1)


class RoutedLayer:
    """The nodes of a graph that hold the branches of one experts region.

    Attributes:
        node: of the experts operator, whose output is the branches.
        ids: the node of the expert of each branch.
        output: the node of the region's output.
        experts: their number.
        tail: the nodes from the branches to the output.
        needs: the nodes whose values `read` uses.
    """

    def __init__(self, program: Program, region: Region, info: ExpertsInfo) -> None:
        self.gm = program.analysis.gm
        self.region, self.info = region, info
        (self.node,) = fx.resolve(self.gm, (info.node,))
        (self.ids,) = fx.resolve(self.gm, (info.ids,))
        (self.output,) = fx.resolve(self.gm, region.outputs[:1])
        self.experts = sum(1 for _ in fx.nodes_of(self.node.args[2]))  # `up`: one weight per expert
        inside = {*region.body, self.output.name}
        self.tail: list[torch.fx.Node] = []
        dependent = {self.node}
        for node in self.gm.graph.nodes:
            if node.name in inside and any(source in dependent for source in node.all_input_nodes):
                self.tail.append(node)
                dependent.add(node)
        sources = {source for node in self.tail for source in node.all_input_nodes}
        self.needs = {self.node, self.ids, self.output} | (sources - dependent)

    def read(self, values: Values) -> Reading | None:
        """The branches, from the values of `needs`; None: the output is not one sum of branches per token."""
        y = values[self.node]
        ids = values[self.ids].reshape(y.shape[:2])
        with autocast_is(()), torch.no_grad():
            rest = self._output_for(torch.zeros_like(y), values).float()
            if rest.numel() != y.shape[0] * y.shape[2]:
                return None
            gates = []
            for slot in range(y.shape[1]):  # the sum is linear in y: ones in one slot give the gate of that slot
                ones = torch.zeros_like(y)
                ones[:, slot] = 1
                change = self._output_for(ones, values).float() - rest
                gates.append(change.reshape(y.shape[0], y.shape[2]).mean(dim=1))
        rest = rest.reshape(y.shape[0], y.shape[2])
        return Reading(ids, torch.stack(gates, dim=1), y.float(), rest, self.experts)

    def _output_for(self, y: Tensor, values: Values) -> Tensor:
        """The output of the region if its branches were `y`."""
        computed: Values = {self.node: y}
        interpreter = torch.fx.Interpreter(self.gm)
        for node in self.tail:
            interpreter.env = {
                source: computed[source] if source in computed else values[source] for source in node.all_input_nodes
            }
            computed[node] = interpreter.run_node(node)
        output: Tensor = computed[self.output] if self.output in computed else values[self.output]
        return output


def values_of(program: Program, args: Sequence[Any], nodes: Iterable[torch.fx.Node]) -> Values:
    """The values of these nodes in a call with `args`; other values are freed after their last use."""
    interpreter = _RecordingInterpreter(program.analysis.gm, set(nodes))
    with autocast_is(()), torch.no_grad():
        interpreter.run(*in_graph_order(program, args))
    return interpreter.values


def in_graph_order(program: Program, args: Sequence[Any]) -> list[Any]:
    """The arguments of a call in the order of the graph's placeholders."""
    positions = {graph_input.name: i for i, graph_input in enumerate(program.analysis.facts.inputs)}
    return [args[positions[node.name]] for node in fx.placeholders(program.analysis.gm)]


class _RecordingInterpreter(torch.fx.Interpreter):
    """Records the values of some nodes."""

    def __init__(self, gm: torch.fx.GraphModule, nodes: set[torch.fx.Node]) -> None:
        super().__init__(gm)
        self.nodes, self.values = nodes, Values()

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.values[n] = value
        return value
