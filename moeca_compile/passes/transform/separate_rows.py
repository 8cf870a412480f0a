"""Rows of a buffer that the latent isn't written to -> read before it is written: a text tower beside the image.

Before: `slice(index_put(buffer, [rows], latent_tokens), 0, start, end)`, as where text and image tokens are packed into
one sequence and taken apart again.
After: `moeca::unwritten(slice(buffer, 0, start, end), rows, start, end)`, the same values, which don't depend on the
latent, so that they and all that follows from them can be hoisted.
Which rows are written is known at run time only: the first call says it, and the operator looks in later ones, and
raises where [start, end) is written after all.
Does nothing where what is written doesn't depend on the latent, or where `rows` is no argument of the model, an index
or a mask along dimension 0.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.ops import rows as row_ops
from moeca_compile.passes.analysis.find_inputs import find_inputs
from moeca_compile.passes.facts import Facts


def separate_rows(gm: GraphModule, facts: Facts) -> GraphModule:
    reads = [node for node in gm.graph.nodes if _written_rows(node) is not None]
    if not reads:
        return gm
    latent = {name for name, level in find_inputs(gm, facts).dependence.items() if level == "latent"}
    for node in reads:  # grows: a buffer may have been written several times
        put = fx.arg(node, 0)
        buffer, rows, tokens = fx.arg(put, 0), _written_rows(node), fx.arg(put, 2)
        start, end = _range(node)
        index = facts.indices.get(rows.name) if rows is not None else None
        if index is None or row_ops.points_at(index, start, end, fx.shape(put)[0]):
            continue
        if tokens.name not in latent or buffer.name in latent:
            continue
        with gm.graph.inserting_before(node):
            part = fx.call(gm, aten.slice.Tensor, (buffer, 0, start, end), like=node)
            new = fx.call(gm, row_ops.UNWRITTEN, (part, rows, start, end, fx.shape(put)[0]), like=node)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        if _written_rows(part) is not None:
            reads.append(part)
    return gm


def _written_rows(node: Node) -> Node | None:
    """Where `node` reads a range of rows of a buffer of which some were written: the index of those."""
    if node.target is not aten.slice.Tensor or len(node.args) != 4 or node.args[1] != 0:  # a fifth: a step
        return None
    put = node.args[0]
    if not isinstance(put, Node) or put.target is not aten.index_put.default or len(put.args) > 3:
        return None
    indices = put.args[1]
    (rows, *others) = indices if isinstance(indices, (list, tuple)) else (None,)
    return rows if isinstance(rows, Node) and not others and len(fx.shape(rows)) == 1 else None


def _range(node: Node) -> tuple[int, int]:
    length = fx.shape(fx.arg(node, 0))[0]
    start, end, _ = slice(node.args[2], node.args[3]).indices(length)
    return start, end
