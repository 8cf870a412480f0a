"""Expert weights side by side in one storage, so that a GPU's grouped matrix multiply reads them where they lie.

`moeca::experts` gets one tensor an expert, as models keep them; a grouped multiply wants all of a layer as one. Where
they don't lie evenly spaced they are stacked at every call, which reads and writes each weight once more.
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
    """For each list of weights that a `moeca::experts` of the graph gets: the tensors, if all are parameters that a
    grouped multiply takes. `args` are the call's arguments, by position of `inputs`."""
    positions = {one.name: i for i, one in enumerate(inputs) if one.is_weight}
    for node in gm.graph.nodes:
        if not fx.is_experts(node):
            continue
        groups = [list(fx.nodes_of(group)) for group in node.args[2:]]
        if not all(one.name in positions for group in groups for one in group):
            continue
        found = [[args[positions[one.name]] for one in group] for group in groups]
        up, down = found[:2]
        if up[0].device.type in DEVICES and can_group(up[0], up, down):
            yield from filter(None, found)


def put_side_by_side(groups: Iterator[Sequence[torch.Tensor]]) -> None:
    """Move each group's tensors into one storage, in place and a group at a time; values and objects stay. What lies
    so already, shares its storage, or is an inference tensor is left alone."""
    with torch.inference_mode(False), torch.no_grad():
        for group in groups:
            if all(_is_free(one) for one in group):
                for tensor, place in zip(group, stacked(group), strict=True):
                    tensor.data = place


def _is_free(tensor: torch.Tensor) -> bool:
    return not tensor.is_inference() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
