"""An einsum of one operand that only reorders its axes (`b s e -> b e s`) becomes the `permute` that it is.

Before: what the tracer left.  After: the same values, bit for bit.
Does nothing where an axis is summed, repeated or left to an ellipsis. To every finder an einsum is a product: a
reordering of scores would pass for the projection that made them.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from moeca_compile import fx
from moeca_compile.fx import aten
from moeca_compile.passes.context import Context


def einsum_to_permute(gm: GraphModule, ctx: Context) -> GraphModule:
    for node in list(gm.graph.nodes):
        order = _order(node)
        if order is not None:
            (source,) = node.all_input_nodes
            with gm.graph.inserting_before(node):
                moved = fx.call(gm, aten.permute.default, (source, order), like=node)
            node.replace_all_uses_with(moved)
            gm.graph.erase_node(node)
    return gm


def _order(node: Node) -> list[int] | None:
    """The axes of the operand in the result's order."""
    if node.target is not aten.einsum.default or len(list(fx.nodes_of(node.args[1]))) != 1:
        return None
    before, arrow, after = str(node.args[0]).replace(" ", "").partition("->")
    if not arrow:
        after = "".join(sorted(before))
    plain = before.isalpha() and len(set(before)) == len(before) and sorted(before) == sorted(after)
    return [before.index(axis) for axis in after] if plain else None
