"""A linear over a slice of the channels -> over the same rows in two axes: one matrix product, not one a sample.

Before: Inductor decomposes a linear whose input isn't contiguous into a batch of products (`bmm`), although the rows of
a slice lie evenly spaced. The shared experts of DiT-MoE read such slices.  After: `view`, linear, `view`, as eager does
it; `mm` reads the rows where they are.
Does nothing where every linear reads a contiguous value.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.variant import Variant

_LINEAR, _VIEW = torch.ops.aten.linear.default, torch.ops.aten.view.default


def fold_linear(gm: GraphModule, variant: Variant) -> GraphModule:
    for node in list(gm.graph.nodes):
        if node.target is not _LINEAR or fx.has_unknown_size(node):
            continue
        source, *weights = node.args
        value = fx.need(source)
        if value.dim() < 3 or value.is_contiguous() or not _rows_are_evenly_spaced(value):
            continue
        with gm.graph.inserting_before(node):
            rows = fx.call(gm, _VIEW, (source, [-1, value.shape[-1]]), like=node)
            flat = fx.call(gm, _LINEAR, (rows, *weights), like=node)
            result = fx.call(gm, _VIEW, (flat, list(fx.shape(node))), like=node)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    return gm


def _rows_are_evenly_spaced(value: Tensor) -> bool:
    """Whether the axes but the last are one, by their strides."""
    axes = [(size, stride) for size, stride in zip(value.shape[:-1], value.stride()[:-1], strict=True) if size != 1]
    return all(outer == size * inner for (_, outer), (size, inner) in pairwise(axes))
