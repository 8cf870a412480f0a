"""Moves expert weights side by side into one storage, so that a GPU's grouped matrix multiply reads them in place.

`moeca::experts` takes one tensor for each expert, as models store them. A grouped multiply takes all experts of a layer
as one tensor. Weights that aren't evenly spaced are stacked at every call, which reads and writes each weight once
more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.capture import Input
from moeca_compile.ops.experts import can_group, stacked

DEVICES = {"cuda"}  # where experts run as grouped multiplies


def expert_weights(gm: GraphModule, inputs: Sequence[Input], args: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """The weights of the graph's experts, in groups that a grouped multiply takes.

    Args:
        gm: the captured graph.
        inputs: of the graph.
        args: of a call, one for each of `inputs`.

    Yields:
        For each `moeca::experts` node whose weights are all parameters: the tensors of each of its weight lists.
    """
    positions = {source.name: i for i, source in enumerate(inputs) if source.is_weight}
    for node in gm.graph.nodes:
        if not fx.is_experts(node):
            continue
        groups = [list(fx.nodes_of(group)) for group in node.args[2:]]
        names = [weight.name for group in groups for weight in group]
        if not all(name in positions for name in names):
            continue
        tensors = [[args[positions[weight.name]] for weight in group] for group in groups]
        up, down = tensors[:2]
        if up[0].device.type in DEVICES and can_group(up[0], up, down):
            yield from filter(None, tensors)


def put_side_by_side(groups: Iterator[Sequence[torch.Tensor]]) -> None:
    """Move the tensors of each group into one storage, in place and one group at a time.

    Values and tensor objects stay. A group is left as it is if one of its tensors shares its storage (as it does once
    moved) or is an inference tensor.
    """
    with torch.inference_mode(False), torch.no_grad():
        for group in groups:
            if all(map(_owns_storage, group)):
                for tensor, moved in zip(group, stacked(group), strict=True):
                    tensor.data = moved


def _owns_storage(tensor: torch.Tensor) -> bool:
    return not tensor.is_inference() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
