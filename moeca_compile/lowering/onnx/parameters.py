"""Weights that can be exchanged are inputs of the graph while it is translated, and initializers afterwards.

ONNX's optimizer folds and merges constants by their values. It doesn't see the values of inputs, so the graph is the
same for all weights of the same shapes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.lowering.onnx.origins import Origin, origins_of
from moeca_compile.runtime.bundle.refit.recipes import Recipe

RECIPE = "moeca_recipe"  # in the meta of an onnx_ir.Value that is an initializer
COMPUTED = "moeca_computed"  # in the meta of an onnx_ir.Model: names of parameters that its other constants depend on


class Constant(NamedTuple):
    """A constant of a graph that is made of parameters by a recipe."""

    recipe: Recipe
    value: Tensor


def as_inputs(gm: GraphModule) -> list[Constant]:
    """Make every constant with a recipe an input, after the graph's other inputs.

    Returns:
        What they are, in their order.
    """
    origins, constants = origins_of(gm), list[Constant]()
    placeholders: dict[str, Node] = {}
    last = fx.placeholders(gm)[-1]
    for node in [node for node in gm.graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        recipe = origins.get(name, Origin()).recipe
        if recipe is None:
            continue
        if name not in placeholders:
            with gm.graph.inserting_after(last):
                last = placeholders[name] = gm.graph.placeholder(name)
            last.meta = dict(node.meta)
            constants.append(Constant(recipe, operator.attrgetter(name)(gm)))
        node.replace_all_uses_with(placeholders[name])
        gm.graph.erase_node(node)
    gm.delete_all_unused_submodules()
    gm.recompile()
    return constants


def computed_with(gm: GraphModule) -> frozenset[str]:
    """The names of the parameters that the graph's other constants are computed with."""
    origins = origins_of(gm)
    names = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    return frozenset().union(*(origins.get(name, Origin()).parameters for name in names))


def as_initializers(model: Any, constants: Sequence[Constant]) -> None:
    """Make the last inputs of an onnx_ir.Model initializers of these values."""
    if not constants:
        return
    from onnx_ir.tensor_adapters import TorchTensor

    graph = model.graph
    values = list(graph.inputs)[-len(constants) :]
    del graph.inputs[-len(constants) :]
    for value, (recipe, tensor) in zip(values, constants, strict=True):
        value.const_value = TorchTensor(tensor, name=value.name)
        value.meta[RECIPE] = recipe
        graph.initializers.add(value)


def example_inputs(gm: GraphModule, constants: Sequence[Constant]) -> tuple[Tensor, ...]:
    """Of the graph, `constants` last: zeros for what a call brings."""
    placeholders = fx.placeholders(gm)
    own = placeholders[: len(placeholders) - len(constants)]
    return (*map(_zeros, own), *(constant.value for constant in constants))


def _zeros(node: Node) -> Tensor:
    val = fx.need(node)
    return torch.zeros(tuple(val.shape), dtype=val.dtype)
