"""The weights of `moeca::branches_` -> one input with their addresses.

Before: an operator that takes the weights of all experts, each a tensor of its own.  After: in their place one tensor
that says where they lie, noted in the graph's meta (`with_addresses`). Some tens of tensors a layer take longer on
their way through Python and torch's dispatcher than the few rows of a step that they are multiplied with.
Does nothing where no row computes some of the branches in place, or where a weight isn't contiguous float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moeca_compile.errors import LoweringError
from moeca_compile.graph import fx
from moeca_compile.graph.variant import Variant
from moeca_compile.ops.branches import ACTIVATIONS, BRANCHES, BRANCHES_AT

_PLACES = "moeca_weight_places"
_FIRST, _AFTER = 18, 24  # the weights among the operator's arguments

Places = list[list[int]]  # of the weights of a layer among the arguments, by kind; -1 where there is none


def weight_addresses(gm: GraphModule, variant: Variant) -> GraphModule:
    places = {node: i for i, node in enumerate(fx.placeholders(gm))}
    last, tables, read = next(reversed(places)), list[Places](), set[Node]()
    for node in [node for node in gm.graph.nodes if node.target is BRANCHES]:
        groups: list[list[Node]] = [list(fx.nodes_of(group)) for group in node.args[_FIRST:_AFTER]]
        weights = [weight for group in groups for weight in group]
        if node.args[_AFTER] not in ACTIVATIONS or not all(weight in places for weight in weights):
            continue
        if not _are_ready(map(fx.need, weights)):
            continue
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"weights_{len(tables):03d}")
        with fx.fake_mode_of(fx.need(weights[0])):
            last.meta["val"] = torch.empty(6 * len(groups[0]), dtype=torch.int64)
        hidden = fx.shape(groups[0][0])[0]
        with gm.graph.inserting_before(node):
            args = (*node.args[:_FIRST], last, hidden, *node.args[_AFTER:])
            stand_in = fx.call(gm, BRANCHES_AT, args, like=node)
        node.replace_all_uses_with(stand_in)
        gm.graph.erase_node(node)
        tables.append([[places[one] for one in group] or [-1] * len(groups[0]) for group in groups])
        read |= set(weights)
    gone = {node for node in read if not node.users}
    for node in gone:
        gm.graph.erase_node(node)
    gm.meta[_PLACES] = [i for node, i in places.items() if node not in gone], tables
    return gm


def with_addresses(gm: GraphModule) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Makes arguments for this graph out of those that it took before: weights become their addresses."""
    kept, tables = gm.meta.get(_PLACES, ([], []))
    if not tables:
        return lambda args: args
    places = sorted({place for layer in tables for group in layer for place in group if place >= 0})
    last: tuple[tuple[int, ...], list[Tensor]] = ((), [])

    def replaced(args: Sequence[Any]) -> Sequence[Any]:
        nonlocal last
        weights = [args[place] for place in places]
        found, made = tuple(map(Tensor.data_ptr, weights)), last
        if found != made[0]:
            if not _are_ready(weights):
                raise LoweringError(
                    "a weight of the experts was replaced by one that isn't contiguous float32 on a CPU"
                )
            at = {-1: 0, **dict(zip(places, found, strict=True))}
            made = last = found, [torch.tensor([at[i] for group in layer for i in group]) for layer in tables]
        return [*(args[i] for i in kept), *made[1]]

    return replaced


def _are_ready(weights: Iterable[Tensor]) -> bool:
    """Whether the kernel reads them where they lie."""
    return all(
        weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights
    )
