"""Attention anchors: a scaled-dot-product call, or softmax(Q K^T) V written out.

Before: functional ATen with SDPA whole.  After: one `AttentionInfo` each. Nothing else is looked at.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule, Node

from moeca_compile import fx
from moeca_compile.fx import aten
from moeca_compile.passes.context import Context
from moeca_compile.regions import AttentionInfo

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
# what may stand between QK^T and its softmax, and between the softmax and V: scale, mask, bias, casts
_BETWEEN = fx.VIEWS | {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.masked_fill.Scalar,
    aten.masked_fill.Tensor, aten.where.self, aten.dropout.default,
}  # fmt: skip


def find_attention(gm: GraphModule, ctx: Context) -> Context:
    found = []
    for node in gm.graph.nodes:
        if node.target is fx.SDPA:
            found.append(AttentionInfo(node.name, *(fx.arg(node, i).name for i in range(3))))
        elif node.target in _PRODUCTS and (written_out := _written_out(node)):
            found.append(written_out)
    return replace(ctx, attention=tuple(found))


def _written_out(product: Node) -> AttentionInfo | None:
    operands = list(fx.nodes_of(product.args))
    if len(operands) < 2:
        return None
    weights, val = operands[-2:]
    softmax = _climb(weights, _SOFTMAX)
    scores = _climb(softmax.args[0], _PRODUCTS) if softmax is not None else None
    if softmax is None or scores is None:
        return None
    query, key = list(fx.nodes_of(scores.args))[-2:]
    return AttentionInfo(product.name, query.name, key.name, val.name)


def _climb(node: object, targets: tuple[object, ...]) -> Node | None:
    """The nearest ancestor with one of `targets`, through scaling, masking and views only."""
    front = [node]
    while front:
        here = front.pop()
        if isinstance(here, Node):
            if here.target in targets:
                return here
            if here.target in _BETWEEN:
                front.extend(reversed(here.all_input_nodes))
    return None
