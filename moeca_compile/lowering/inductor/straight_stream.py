"""What goes from block to block comes in the order of its axes, so that every block reads along its channels.

Before: a patch embedding's output is its convolution's, channels first in memory and transposed by a view; adding to it
keeps that order, so that each block is compiled for a stream whose channels lie far apart.  After: it is copied into
order once, ahead of the first block. Without bodies for equal blocks Inductor chooses so by itself; across their
borders it keeps the order that was traced.
Does nothing where no blocks are equal, or where what they read is in order.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.equal_blocks import equal_blocks, runs


def straight_stream(gm: GraphModule, variant: Variant) -> GraphModule:
    if equal_blocks(gm):
        copy_into_order(gm, {source for block in runs(gm) for source in block.reads})
    return gm


def copy_into_order(gm: GraphModule, borders: Iterable[Node]) -> None:
    """Copy what crosses a border of blocks into the order of its axes, in place in the graph.

    Args:
        borders: nodes that one block gives and another reads.
    """
    if any(fx.has_unknown_size(node) for node in gm.graph.nodes):
        return
    wanted = {node for node in borders if node.op == "call_function" and not _is_an_inputs(node)}
    moved: set[Node] = set()
    for node in list(gm.graph.nodes):
        if not moved.isdisjoint(node.all_input_nodes):
            if node.op == "call_function":
                fx.refresh(node)
            moved.add(node)
        if node in wanted and _is_out_of_order(node):
            with gm.graph.inserting_after(node):
                straight = fx.call(
                    gm, torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}, like=node
                )
            node.replace_all_uses_with(straight, delete_user_cb=lambda user, own=straight: user is not own)
            moved.add(straight)


def _is_an_inputs(node: Node) -> bool:
    """Whether it is a view of an input: weights are read as they lie."""
    return fx.strip(node, fx.is_view_or_part).op == "placeholder"


def _is_out_of_order(node: Node) -> bool:
    """Whether its elements fill their memory in another order than that of its axes."""
    value = fx.tensor(node)
    if value is None or not value.is_floating_point() or value.is_contiguous():
        return False
    in_memory = sorted(range(value.dim()), key=value.stride().__getitem__, reverse=True)
    with fx.fake_mode_of(value):
        return value.permute(in_memory).is_contiguous()
