"""A second copy of a part of the graph that runs on M chosen tokens of each sample in place of all N.

Before: nodes whose token axes are known (`find_divisions`), and the chosen positions [B, M].  After: new nodes beside
the old ones, each of the same shape but for M at its token axis. What has no token axis is shared with the old ones.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from moeca_compile.errors import InvariantError
from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.regions import Divisible
from moeca_compile.passes.partial.token_axes import VIEWING, Axis, is_pointwise


class Slice:
    """Builds the copy at the graph's insertion point.

    Args:
        gm: the graph, changed in place.
        info: where the tokens lie.
        chosen: node of the positions, int64 [B, M], each in [0, N).
    """

    def __init__(self, gm: GraphModule, info: Divisible, chosen: Node) -> None:
        self.gm, self.info, self.chosen = gm, info, chosen
        self.axes = {name: Axis(dim, merged) for name, dim, merged in info.axes}
        self.count = fx.shape(chosen)[1]
        self.made: dict[Node, Node] = {}

    def follow(self, body: Sequence[Node], replaced: Mapping[Node, Node] | None = None) -> None:
        """Copy `body`, in graph order. `replaced`: in place of what the named nodes would give, full-size values."""
        for node in body:
            if node.name not in self.axes:
                continue
            target: Any = node.target
            args, kwargs = map_arg((node.args, node.kwargs), functools.partial(self._source, node, replaced or {}))
            if target in VIEWING:
                target, args, kwargs = aten.reshape.default, (args[0], self._sizes(node)), {}
            elif target is aten.expand.default:
                args = (args[0], self._sizes(node), *args[2:])
            copy = fx.call(self.gm, target, args, kwargs, like=node)
            val = fx.tensor(node)
            if val is not None and fx.shape(copy) != self._sizes(node):
                raise InvariantError(f"{node.name} on {self.count} tokens is {fx.shape(copy)}, not {self._sizes(node)}")
            self.made[node] = copy

    def take(self, node: Node, axis: Axis, lead: int = 0) -> Node:
        """The chosen tokens of a full value.

        `lead`: how many axes a reader puts before those of `node` by broadcasting. A table without samples, [N, ..] or
        [1, N, ..], gives rows for each sample.
        """
        shape = fx.shape(node)
        if axis.merged:
            split = self._call(aten.reshape.default, node, [self.info.batch, self.info.tokens, *shape[1:]])
            return self._call(aten.reshape.default, self._gather(split, 1), [-1, *shape[1:]])
        sizes = [1] * lead + list(shape)
        dim = axis.dim + lead
        if dim == 0:
            sizes, dim = [1, *sizes], 1
        if sizes[0] != self.info.batch:
            node = self._call(aten.reshape.default, node, sizes)
            node = self._call(aten.expand.default, node, [self.info.batch, *sizes[1:]])
        return self._gather(node, dim)

    def index(self, dim: int, shape: Sequence[int]) -> Node:
        """The positions, as gather and scatter want them for a value of `shape` with M tokens at `dim`."""
        sizes = [self.info.batch if d == 0 else self.count if d == dim else 1 for d in range(len(shape))]
        wide = [self.count if d == dim else size for d, size in enumerate(shape)]
        return self._call(aten.expand.default, self._call(aten.reshape.default, self.chosen, sizes), wide)

    def put(self, full: Node, part: Node, dim: int) -> Node:
        """`full` with the chosen tokens replaced by `part`."""
        return self._call(aten.scatter.src, full, dim, self.index(dim, fx.shape(full)), part)

    def _gather(self, node: Node, dim: int) -> Node:
        return self._call(aten.gather.default, node, dim, self.index(dim, fx.shape(node)))

    def _source(self, user: Node, replaced: Mapping[Node, Node], operand: Node) -> Node:
        """What stands for the `operand` of `user` in the copy."""
        if operand in replaced:
            return replaced[operand]
        if operand in self.made:
            return self.made[operand]
        axis = self.axes.get(operand.name)
        if axis is None:
            return operand
        lead = len(fx.shape(user)) - len(fx.shape(operand)) if is_pointwise(user.target) else 0
        self.made[operand] = self.take(operand, axis, lead)
        return self.made[operand]

    def _sizes(self, node: Node) -> tuple[int, ...]:
        axis = self.axes[node.name]
        length = self.count * (self.info.batch if axis.merged else 1)
        return tuple(length if dim == axis.dim else size for dim, size in enumerate(fx.shape(node)))

    def _call(self, target: Any, *args: Any) -> Node:
        return fx.call(self.gm, target, args)
