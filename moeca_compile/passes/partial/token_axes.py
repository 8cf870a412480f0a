"""Where the tokens of a sample lie in each value of a region: so that the region can be run on some of them.

From the values that enter with a token axis [B, N, ...] on, every operator either carries the axis along, or doesn't
touch it, or mixes tokens; the last is refused with its name. Batch and tokens may lie in one axis [B * N, ...] for a
while. An attention mixes tokens by its nature: the axis of its result is that of its queries.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.fx import Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten


class Axis(NamedTuple):
    """`dim` of a value holds its tokens; `merged`: those of all samples, one sample after the other."""

    dim: int
    merged: bool = False


class MixesTokens(Exception):
    """A node whose value for one token depends on others, or that isn't understood. Its text says which and why."""


class TokenAxes:
    """Axes of the nodes of a region; `of` is filled by `follow`.

    Args:
        batch: samples B.
        tokens: tokens a sample N, more than one.
    """

    def __init__(self, batch: int, tokens: int) -> None:
        self.batch, self.tokens = batch, tokens
        self.of: dict[Node, Axis] = {}

    def seed(self, node: Node) -> bool:
        """Take what enters as a stream of tokens if it has the shape of one: [B, N, ...] or [B * N, D]."""
        shape = fx.shape(node)
        if len(shape) >= 3 and shape[:2] == (self.batch, self.tokens):
            self.of[node] = Axis(1)
        elif len(shape) == 2 and shape[0] == self.batch * self.tokens:
            self.of[node] = Axis(0, merged=True)
        return node in self.of

    def follow(self, body: Iterable[Node]) -> None:
        """Find the axes of `body`, nodes in graph order.

        Raises:
            MixesTokens: at the first node that can't be run on some of the tokens.
        """
        for node in body:
            if any(source in self.of for source in node.all_input_nodes):
                axis = self._axis(node)
                if axis is not None:
                    self.of[node] = axis

    def length(self, axis: Axis) -> int:
        """The size of an axis."""
        return self.tokens * (self.batch if axis.merged else 1)

    def _axis(self, node: Node) -> Axis | None:
        target: Any = node.target
        if target is operator.getitem:
            return self.of[fx.arg(node, 0)]
        rule = _RULES.get(target)
        if rule is None and (is_pointwise(target) or target in fx.CASTS):
            rule = TokenAxes._pointwise
        if rule is None:
            raise MixesTokens(f"{node.name}: {target} isn't understood")
        axis = rule(self, node)
        val = fx.tensor(node)
        if val is not None and fx.shape(node)[axis.dim] != self.length(axis):
            raise MixesTokens(f"{node.name}: {target} changes the number of tokens")
        return axis

    # -- rules ------------------------------------------------------------------------------------------------------

    def _pointwise(self, node: Node) -> Axis:
        """The operands' axes, aligned from the right; one that has the axis unmarked (a table of positions) gets it."""
        rank = len(fx.shape(node))
        with_axes = [(operand, self.of[operand]) for operand in node.all_input_nodes if operand in self.of]
        aligned = {Axis(axis.dim + rank - len(fx.shape(operand)), axis.merged) for operand, axis in with_axes}
        if len(aligned) != 1:
            raise MixesTokens(f"{node.name}: its operands have their tokens in different places")
        (axis,) = aligned
        for source in node.all_input_nodes:
            shape = fx.shape(source)
            dim = axis.dim - (rank - len(shape))
            if source not in self.of and dim >= 0 and shape[dim] != 1:
                if axis.merged or shape[dim] != self.tokens or fx.shape(node)[0] != self.batch:
                    raise MixesTokens(f"{node.name}: {source.name} {shape} can't be taken apart by tokens")
                self.of[source] = Axis(dim)
        return axis

    def _same(self, node: Node) -> Axis:
        return self._first(node)

    def _linear(self, node: Node) -> Axis:
        return self._not_at(node, len(fx.shape(fx.arg(node, 0))) - 1)

    def _norm(self, node: Node) -> Axis:
        sizes: Any = node.args[1]
        return self._not_at(node, *range(len(fx.shape(fx.arg(node, 0))) - len(sizes), len(fx.shape(node))))

    def _along(self, node: Node) -> Axis:
        """Softmax, split, chunk: something happens along one dim, which must be another one."""
        position = 2 if node.target in _SPLITS else 1
        dim: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
        return self._not_at(node, dim)

    def _flip(self, node: Node) -> Axis:
        dims: Any = node.args[1]
        return self._not_at(node, *dims)

    def _reduce(self, node: Node) -> Axis:
        axis, rank = self._first(node), len(fx.shape(fx.arg(node, 0)))
        dims: Any = node.args[1] if len(node.args) > 1 else None
        reduced = sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank)))
        self._not_at(node, *reduced)
        keeps_dims = len(node.args) > 2 and bool(node.args[2])
        return axis if keeps_dims else Axis(axis.dim - sum(d < axis.dim for d in reduced), axis.merged)

    def _drop(self, node: Node) -> Axis:
        """Unbind, select, squeeze: one dim goes away."""
        rank = len(fx.shape(fx.arg(node, 0)))
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        axis = self._not_at(node, dim)
        return Axis(axis.dim - (dim % rank < axis.dim), axis.merged)

    def _unsqueeze(self, node: Node) -> Axis:
        axis, dim = self._first(node), int(str(node.args[1]))
        return Axis(axis.dim + (dim % len(fx.shape(node)) <= axis.dim), axis.merged)

    def _permute(self, node: Node) -> Axis:
        axis, rank = self._first(node), len(fx.shape(node))
        order = list(range(rank))
        args: Any = node.args
        if node.target is aten.permute.default:
            order = [d % rank for d in args[1]]
        else:
            a, b = (d % rank for d in args[1:3]) if len(args) > 1 else (0, 1)
            order[a], order[b] = b, a
        return Axis(order.index(axis.dim), axis.merged)

    def _view(self, node: Node) -> Axis:
        axis = self._first(node)
        old, new = fx.shape(fx.arg(node, 0)), fx.shape(node)
        behind = math.prod(old[axis.dim + 1 :])
        before = math.prod(old[: axis.dim])
        for dim, size in enumerate(new):
            if math.prod(new[dim + 1 :]) != behind:
                continue
            if size == self.tokens and math.prod(new[:dim]) == (before * self.batch if axis.merged else before):
                return Axis(dim)
            all_tokens = self.batch * self.tokens
            if size == all_tokens and (axis.merged or (axis.dim == 1 and old[0] == self.batch)) and dim == 0:
                return Axis(0, merged=True)
        raise MixesTokens(f"{node.name}: {node.target} from {old} to {new} puts tokens and other things in one axis")

    def _expand(self, node: Node) -> Axis:
        axis = self._first(node)
        return Axis(axis.dim + len(fx.shape(node)) - len(fx.shape(fx.arg(node, 0))), axis.merged)

    def _cat(self, node: Node) -> Axis:
        parts = list(fx.nodes_of(node.args[0]))
        axes = {self.of.get(part) for part in parts}
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        (axis,) = axes if len(axes) == 1 else (None,)
        if axis is None or dim % len(fx.shape(node)) == axis.dim:
            raise MixesTokens(f"{node.name}: it joins tokens with something else")
        return axis

    def _matmul(self, node: Node) -> Axis:
        """Rows times a matrix that is the same for all of them."""
        left, right = (fx.arg(node, i) for i in ((1, 2) if node.target is aten.addmm.default else (0, 1)))
        if left not in self.of or right in self.of:
            raise MixesTokens(f"{node.name}: a product over tokens")
        axis, rank = self.of[left], len(fx.shape(left))
        if axis.dim == rank - 1:
            raise MixesTokens(f"{node.name}: a product over tokens")
        return Axis(axis.dim + len(fx.shape(node)) - rank, axis.merged)

    def _attention(self, node: Node) -> Axis:
        query, *read = (fx.arg(node, i) for i in range(3))
        rank = len(fx.shape(query))
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, Node) and (mask in self.of or fx.shape(mask)[-2] != 1):
            raise MixesTokens(f"{node.name}: its mask differs from query to query")
        if (node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal")) is True:
            raise MixesTokens(f"{node.name}: a causal attention")
        expected = Axis(rank - 2)
        axes = [self.of.get(query), *(self.of.get(operand, expected) for operand in read)]
        if fx.shape(query)[0] != self.batch or any(axis != expected for axis in axes):
            raise MixesTokens(f"{node.name}: its queries or keys lie in an unusual order")
        return expected

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _first(self, node: Node) -> Axis:
        axis = self.of.get(fx.arg(node, 0))
        if axis is None or any(source in self.of for source in node.all_input_nodes if source is not node.args[0]):
            raise MixesTokens(f"{node.name}: {node.target} of tokens in more than its first operand")
        return axis

    def _not_at(self, node: Node, *dims: int) -> Axis:
        axis, rank = self._first(node), len(fx.shape(fx.arg(node, 0)))
        if axis.dim in {dim % rank for dim in dims}:
            raise MixesTokens(f"{node.name}: {node.target} works along the tokens")
        return axis


def is_pointwise(target: object) -> bool:
    """Whether an operator works element by element."""
    return isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags


_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
VIEWING = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
_RULES: dict[object, Callable[[TokenAxes, Node], Axis]] = {
    **dict.fromkeys((aten.clone.default, aten.alias.default, aten.contiguous.default), TokenAxes._same),
    **dict.fromkeys(VIEWING, TokenAxes._view),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.slice.Tensor, *_SPLITS), TokenAxes._along),
    **dict.fromkeys((aten.unbind.int, aten.select.int, aten.squeeze.dim), TokenAxes._drop),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), TokenAxes._permute),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), TokenAxes._norm),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default), TokenAxes._reduce),
    **dict.fromkeys((aten.mm.default, aten.addmm.default, aten.matmul.default), TokenAxes._matmul),
    aten.flip.default: TokenAxes._flip,
    aten.linear.default: TokenAxes._linear,
    aten.unsqueeze.default: TokenAxes._unsqueeze,
    aten.expand.default: TokenAxes._expand,
    aten.cat.default: TokenAxes._cat,
    fx.SDPA: TokenAxes._attention,
}
