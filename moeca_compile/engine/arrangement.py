"""Lets one program serve several of Dynamo's graphs: maps the order and strides of the arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moeca_compile.graph import fx
from moeca_compile.graph.capture import Capture, Input

Strides = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """From the arguments of a graph to those of a program that was made for another graph.

    Attributes:
        places: for each argument of the program, its position among the graph's (None: a number that the program
            doesn't read). None: the order is the same.
        inputs: position and strides of each argument of the program whose strides differ from the graph's.
        outputs: strides of each of the graph's outputs (None: no tensor); empty: they are the program's.
    """

    places: tuple[int | None, ...] | None
    inputs: tuple[tuple[int, Strides], ...] = ()
    outputs: tuple[Strides | None, ...] = ()

    def arranged(self, args: Sequence[Any]) -> Sequence[Any]:
        """The graph's arguments as the program takes them."""
        if self.places is not None:
            args = [None if i is None else args[i] for i in self.places]
        if self.inputs:
            args = list(args)
            for i, strides in self.inputs:
                args[i] = _laid_out(args[i], strides)
        return args

    def results(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The program's results as the graph returns them."""
        if not self.outputs:
            return values
        results = []
        for value, strides in zip(values, self.outputs, strict=True):
            results.append(value if strides is None else _laid_out(value, strides))
        return tuple(results)


def reordered(program: Sequence[Input], graph: Sequence[Input]) -> Arrangement | None:
    """The arrangement of a program's inputs among those of a graph, by label; None: they are in the same order."""
    positions = {source.label: i for i, source in enumerate(graph)}
    places = tuple([positions.get(source.label) for source in program])
    return None if places == tuple(range(len(graph))) else Arrangement(places)


def restrided(program: Capture, graph: Capture) -> Arrangement:
    """The arrangement for a captured graph that computes the same as a program, from inputs in other strides."""
    order = reordered(program.inputs, graph.inputs)
    values = {}
    for node, source in zip(fx.placeholders(graph.gm), graph.inputs, strict=True):
        values[source.label] = fx.value(node)
    inputs = []
    for i, (node, source) in enumerate(zip(fx.placeholders(program.gm), program.inputs, strict=True)):
        old, new = fx.value(node), values.get(source.label)
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.stride() != new.stride():
            inputs.append((i, tuple(map(int, old.stride()))))
    graph_outputs = fx.output_node(graph.gm).args[0]
    assert isinstance(graph_outputs, (tuple, list))
    outputs: list[Strides | None] = []
    for output in graph_outputs:
        value = fx.value(output) if isinstance(output, torch.fx.Node) else None
        outputs.append(tuple(map(int, value.stride())) if isinstance(value, torch.Tensor) else None)
    return Arrangement(None if order is None else order.places, tuple(inputs), tuple(outputs))


def overlaps(value: Any) -> bool:
    """Whether elements of a tensor share memory, or may share it, as after `expand`; no copy can be made there."""
    return isinstance(value, torch.Tensor) and torch._debug_has_internal_overlap(value) != 0


def reads_strides(gm: torch.fx.GraphModule) -> bool:
    """Whether the graph uses strides explicitly, so that other strides of its inputs give other values."""
    return any("as_strided" in str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes)


def _laid_out(tensor: torch.Tensor, strides: Strides) -> torch.Tensor:
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
