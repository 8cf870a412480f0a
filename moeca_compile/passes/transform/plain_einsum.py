"""An einsum that sums nothing becomes what it is: a permute (`b s e -> b e s`), or an elementwise product of two
operands (`b n, b n e -> b n e`).

Before: what the tracer left.  After: the same values, bit for bit.
Does nothing where an axis is summed, repeated or left to an ellipsis. To every finder an einsum is a matmul: reordered
scores would pass for the projection that made them, and gates that scale other gates for experts that they steer.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.passes.facts import Facts


def plain_einsum(gm: GraphModule, facts: Facts) -> GraphModule:
    for node in list(gm.graph.nodes):
        operands, result = _axes(node)
        if result:
            sources = fx.nodes_of(node.args[1])
            with gm.graph.inserting_before(node):
                parts = [_laid_out(gm, *pair, result, node) for pair in zip(sources, operands, strict=True)]
                new = parts[0] if len(parts) == 1 else fx.call(gm, aten.mul.Tensor, parts, like=node)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    return gm


def _axes(node: Node) -> tuple[list[str], str]:
    """The letters of each operand and of the result; none where it is no einsum of one or two that sums nothing."""
    if node.target is not aten.einsum.default:
        return [], ""
    letters, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    operands = letters.split(",")
    if not arrow:
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    plain = len(operands) <= 2 and all(operand.isalpha() and len(set(operand)) == len(operand) for operand in operands)
    return (operands, result) if plain and set("".join(operands)) == set(result) else ([], "")


def _laid_out(gm: GraphModule, source: Node, axes: str, result: str, like: Node) -> Node:
    """An operand with its axes in the result's order, and an axis of one where it has none."""
    order = [axes.index(axis) for axis in result if axis in axes]
    if order != sorted(order):
        source = fx.call(gm, aten.permute.default, (source, order), like=like)
    for position, axis in enumerate(result):
        if axis not in axes:
            source = fx.call(gm, aten.unsqueeze.default, (source, position), like=like)
    return source
