"""Which elements of a graph's values are the same number, told by how operators move them.

Every element has a label. Two elements with the same label are the same number, whatever the inputs are; one with the
negative label is its negative. Operators that only move elements are run on the labels; an operator that computes
element by element gives the same result for the same operands; all else gives numbers of which nothing is known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten

# The result's shape says where the elements go.
_SHAPED = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default})
_SAME = fx.CASTS | {
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.type_as.default,
}  # fmt: skip
_MOVES = ((fx.VIEWS | fx.PARTS) - _SHAPED - _SAME) | {
    aten.cat.default, aten.copy.default, aten.stack.default, aten.slice_scatter.default, aten.repeat.default,
    aten.repeat_interleave.self_int, aten.flip.default, aten.neg.default,
}  # fmt: skip


def operands(node: Node) -> list[Node]:
    """What an operator takes the elements of its result from."""
    if node.target in _SHAPED or node.target in _SAME:  # sizes that come from the batch are nodes too
        return [fx.arg(node, 0)]
    return [fx.arg(node, 1)] if node.target is aten.copy.default else list(node.all_input_nodes)


def is_move(node: Node) -> bool:
    """Whether each element of the result is one of the operands', or its negative."""
    if node.op != "call_function" or not (node.target in _SHAPED or node.target in _SAME or node.target in _MOVES):
        return False
    return all(map(_has_sizes, (node, *operands(node)))) and _is_exact(node)


def moved(node: Node, labels: Callable[[Node], Any]) -> Any:
    """A moving operator's result, with `labels` of its operands in place of their values."""
    if node.target in _SAME:
        return labels(fx.arg(node, 0))
    if node.target in (aten.expand.default, aten.copy.default):
        return labels(operands(node)[0]).expand(fx.shape(node))
    if node.target in _SHAPED:
        return labels(fx.arg(node, 0)).reshape(fx.shape(node))
    if node.target is operator.getitem:
        return labels(fx.arg(node, 0))[node.args[1]]
    args, kwargs = map_arg((node.args, node.kwargs), labels)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _has_sizes(node: Node) -> bool:
    """Whether it is a tensor, or several, of which the sizes are known."""
    values = tree_leaves(fx.value(node))
    return bool(values) and all(
        isinstance(one, Tensor) and all(isinstance(n, int) for n in one.shape) for one in values
    )


def _is_exact(node: Node) -> bool:
    """Whether every number of the operands' types is one of the result's: a copy into a narrower type rounds."""
    (after,) = {one.dtype for one in tree_leaves(fx.value(node))}
    before = {one.dtype for source in operands(node) for one in tree_leaves(fx.value(source))} - {after}
    return all(one.is_floating_point and torch.promote_types(one, after) == after for one in before)


class Elements:
    """The labels of a graph's values.

    Args:
        hoisted: by the names of placeholders, the nodes of other graphs that compute what comes in there.
    """

    def __init__(self, hoisted: Mapping[str, Node]) -> None:
        self._hoisted = hoisted
        self._labels: dict[Node, Any] = {}
        self._parts: dict[Node, Tensor] = {}
        self._count = 0  # of the labels given so far

    def of(self, node: Node) -> Any:
        """The labels of a value in its shape, int64; of a node with several results, of each."""
        waiting = [node]
        while waiting:
            missing = [one for one in self._read(waiting[-1]) if one not in self._labels]
            if not missing:
                one = waiting.pop()
                if one not in self._labels:
                    self._labels[one] = self._label(one)
            waiting += missing
        return self._labels[node]

    def real(self, node: Node) -> Tensor:
        """The labels of a tensor's real numbers; of complex ones real and imaginary part, in one more dimension."""
        labels: Tensor = self.of(node)
        if not fx.need(node).is_complex():
            return labels
        if node not in self._parts:
            self._parts[node] = self._distinct([torch.stack([2 * labels, 2 * labels + 1], dim=-1)])
        return self._parts[node]

    def _read(self, node: Node) -> list[Node]:
        """What the labels of a node follow from."""
        if node.op == "placeholder" and node.name in self._hoisted:
            return [self._hoisted[node.name]]
        return operands(node) if is_move(node) or _is_elementwise(node) else []

    def _label(self, node: Node) -> Any:
        sources = self._read(node)
        if not sources:
            return self._new(fx.value(node))
        if node.op == "placeholder":
            return self._labels[sources[0]]
        if is_move(node):
            return moved(node, self._labels.__getitem__)
        return self._distinct([self._labels[one].expand(fx.shape(node)) for one in sources])

    def _new(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(self._new, value))
        if not isinstance(value, Tensor):
            return value
        first, self._count = self._count + 1, self._count + value.numel()
        return torch.arange(first, self._count + 1).reshape(value.shape)

    def _distinct(self, operands: list[Tensor]) -> Tensor:
        """New labels, the same where all operands' are."""
        found = operands[0]
        for other in operands[1:]:
            _, other = torch.unique(other, return_inverse=True)
            found = torch.unique(found, return_inverse=True)[1] * (int(other.max()) + 1) + other
        _, found = torch.unique(found, return_inverse=True)
        first, self._count = self._count + 1, self._count + int(found.max()) + 1
        labels: Tensor = found + first
        return labels


def _is_elementwise(node: Node) -> bool:
    """Whether the result's elements follow from the operands' elements at the same place, and from numbers."""
    target, tags = node.target, getattr(node.target, "tags", ())
    if target not in fx.CASTS and (torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags):
        return False
    return bool(node.all_input_nodes) and all(map(_has_sizes, (node, *node.all_input_nodes)))
