"""One program for several of Dynamo's graphs: where its arguments are among those of another, and in which strides."""

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
    """Between the callers of a graph and a program that was made for another one.

    Attributes:
        places: where the program's arguments are among the graph's (None: a number, not read); None: in the same ones.
        inputs: arguments of the program that must lie in other strides than the graph's, by position.
        outputs: for those, the strides of what the graph gives; a program for other strides may give others.
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

    def given_back(self, results: tuple[Any, ...]) -> tuple[Any, ...]:
        """The program's results as the graph gives them."""
        if not self.outputs:
            return results
        pairs = zip(results, self.outputs, strict=True)
        return tuple(one if strides is None else _laid_out(one, strides) for one, strides in pairs)


def arrangement(wanted: Sequence[Input], given: Sequence[Input]) -> Arrangement | None:
    """Where the `wanted` inputs are among the `given` ones, by label; None: in the same places."""
    places = {one.label: i for i, one in enumerate(given)}
    order = tuple([places.get(one.label) for one in wanted])
    return None if order == tuple(range(len(given))) else Arrangement(order)


def other_strides(wanted: Capture, given: Capture) -> Arrangement:
    """For a graph, as captured, that computes the same as another from inputs of the same sizes in other strides."""
    at = arrangement(wanted.inputs, given.inputs)
    kinds = {one.label: fx.value(node) for node, one in zip(fx.placeholders(given.gm), given.inputs, strict=True)}
    inputs = []
    for i, (node, one) in enumerate(zip(fx.placeholders(wanted.gm), wanted.inputs, strict=True)):
        old, new = fx.value(node), kinds.get(one.label)
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.stride() != new.stride():
            inputs.append((i, tuple(map(int, old.stride()))))
    given_back = fx.output_node(given.gm).args[0]
    assert isinstance(given_back, (tuple, list))
    results = [fx.value(one) if isinstance(one, torch.fx.Node) else None for one in given_back]
    outputs = tuple([tuple(map(int, one.stride())) if isinstance(one, torch.Tensor) else None for one in results])
    return Arrangement(None if at is None else at.places, tuple(inputs), outputs)


def overlaps(value: Any) -> bool:
    """Whether elements of a tensor lie, or may lie, in one place, as after `expand`: nothing can be copied there."""
    return isinstance(value, torch.Tensor) and torch._debug_has_internal_overlap(value) != 0


def reads_strides(gm: torch.fx.GraphModule) -> bool:
    """Whether a graph of Dynamo's says itself how elements lie, so that other strides give other values."""
    return any("as_strided" in str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes)


def _laid_out(tensor: torch.Tensor, strides: Strides) -> torch.Tensor:
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
