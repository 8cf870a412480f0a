"""Caches that a model writes in place: keys and values of an LLM decoder that denoises over its prompt.

The captured graph is functional: it takes a cache and gives the new one, after its other results. Whoever runs the
graph copies the new one into the caller's tensor. Only a cache may be skipped in a cached step: what is written must
replace what was there and not add to it, as a counter or a running mean does.
"""

from __future__ import annotations

from torch.fx import Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten

# new = write(old, values, ...): what isn't written stays as it is
_WRITES = frozenset(
    {
        aten.slice_scatter.default, aten.select_scatter.default, aten.index_copy.default, aten.copy.default,
        aten.scatter.src,
    }
)  # fmt: skip
_PUTS = frozenset({aten.index_put.default, aten._unsafe_index_put.default})  # they may also add
_LEAST_DIM = 3  # keys are [tokens, heads, width] at least; counters and statistics have less


def is_overwritten(old: Node, new: Node) -> bool:
    """Whether `new` is the tensor `old` with some values replaced by ones that aren't computed from it.

    Args:
        old: a placeholder.
        new: the value that it has after the model ran.
    """
    value = fx.tensor(old)
    if value is None or not value.is_floating_point() or value.dim() < _LEAST_DIM:
        return False
    parts = _parts_of(old)
    return new in parts and fx.shape(new) == fx.shape(old) and all(_is_free_of(parts, node) for node in parts)


def _parts_of(old: Node) -> set[Node]:
    """The placeholder, its views and parts, and these with values replaced."""
    parts = {old}
    for node in old.graph.nodes:
        base = node.args[0] if node.args else None
        if base in parts and (fx.is_view_or_part(node) or _replaces(node)):
            parts.add(node)
    return parts


def _replaces(node: Node) -> bool:
    return node.target in _WRITES or (node.target in _PUTS and (len(node.args) < 4 or not node.args[3]))


def _is_free_of(parts: set[Node], node: Node) -> bool:
    """Whether what `node` writes, if it writes, comes from other inputs alone, or is itself among `parts`."""
    front = [value for value in fx.nodes_of(node.args[1:]) if value not in parts]
    seen = set(front)
    while front:
        for source in front.pop().all_input_nodes:
            if source in parts:
                return False
            if source not in seen:
                seen.add(source)
                front.append(source)
    return True
