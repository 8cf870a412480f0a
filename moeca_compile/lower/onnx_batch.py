"""One graph for every batch, out of two that were captured for a concrete one.

Captures hold sizes as numbers. Where the same graph at two batches has different numbers, they must be a * batch + b;
each becomes an expression of the batch that an input brings. Whatever else differs can't be said, and is refused.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch.fx import GraphModule, Node

from moeca_compile import fx
from moeca_compile.errors import LoweringError
from moeca_compile.fx import aten
from moeca_compile.runtime.manifest import Dim, expression

Pair = tuple[int, int]


def dims(first: Sequence[int], second: Sequence[int], batches: Pair) -> tuple[Dim, ...]:
    """A shape at two batches as one of sizes and expressions.

    Raises:
        LoweringError: no expression a * batch + b gives both.
    """
    if len(first) != len(second):
        raise LoweringError(f"{list(first)} at batch {batches[0]} is {list(second)} at batch {batches[1]}")
    return tuple(expression(*_line(a, b, batches)) for a, b in zip(first, second, strict=True))


def any_batch(gm: GraphModule, twin: GraphModule, batches: Pair) -> GraphModule:
    """A copy of `gm` (captured at `batches[0]`) that takes any batch; `twin` is the same at `batches[1]`.

    Raises:
        LoweringError: the graphs differ in more than in sizes that are linear in the batch.
    """
    gm = fx.copied(gm)
    here, there = list(gm.graph.nodes), list(twin.graph.nodes)
    pairs = itertools.zip_longest(here, there)
    different = next((n for n, o in pairs if n is None or o is None or (n.op, n.target) != (o.op, o.target)), None)
    if different is not None or len(here) != len(there):
        at = f" from {different.name} ({fx.where(different)}) on" if different is not None else ""
        raise LoweringError(
            f"the model's graph at batch {batches[0]} isn't the one at batch {batches[1]}{at}: it branches on "
            "its batch, or loops over it. Export it with dynamic_batch=False"
        )
    rewrite = _Rewrite(gm, dict(zip(there, here, strict=True)), batches)
    for node, other in zip(here, there, strict=True):
        rewrite.node(node, other)
    gm.graph.lint()
    gm.recompile()
    return gm


class _Rewrite:
    def __init__(self, gm: GraphModule, twins: dict[Node, Node], batches: Pair) -> None:
        self.gm, self.twins, self.batches = gm, twins, batches
        self.expressions: dict[Pair, Node] = {}
        self.body = next(node for node in gm.graph.nodes if node.op != "placeholder")
        opposite = {node: other for other, node in twins.items()}
        sized = [
            (node, dim)
            for node in fx.placeholders(gm)
            for dim, sizes in enumerate(zip(fx.shape(node), fx.shape(opposite[node]), strict=False))
            if sizes == batches
        ]
        self.source = sized[0] if sized else None

    def node(self, node: Node, other: Node) -> None:
        if node.op == "get_attr":
            self._constant(node, other)
        elif node.op == "call_function":
            node.args = self._match(node.args, other.args, node)
            node.kwargs = self._match(node.kwargs, other.kwargs, node)

    def _match(self, here: Any, there: Any, node: Node) -> Any:
        if isinstance(here, Node):
            if isinstance(there, Node) and self.twins.get(there) is here:
                return here
        elif isinstance(here, (list, tuple)) and isinstance(there, (list, tuple)) and len(here) == len(there):
            return type(here)(self._match(a, b, node) for a, b in zip(here, there, strict=True))
        elif isinstance(here, dict) and isinstance(there, dict) and here.keys() == there.keys():
            return {name: self._match(value, there[name], node) for name, value in here.items()}
        elif type(here) is int and type(there) is int:
            return here if here == there else self._expression(here, there, node)
        elif type(here) is type(there) and (here == there or here != here):
            return here
        self._refuse(node, here, there)

    def _expression(self, here: int, there: int, node: Node) -> Node:
        try:
            line = _line(here, there, self.batches)
        except LoweringError:
            self._refuse(node, here, there)
        if self.source is None:
            self._refuse(node, here, there)
        if line not in self.expressions:
            with self.gm.graph.inserting_before(self.body):
                if (1, 0) not in self.expressions:
                    self.expressions[1, 0] = self.gm.graph.call_function(aten.sym_size.int, self.source)
                found = self.expressions[1, 0]
                if line[0] != 1:
                    found = self.gm.graph.call_function(operator.mul, (found, line[0]))
                if line[1]:
                    found = self.gm.graph.call_function(operator.add, (found, line[1]))
                self.expressions[line] = found
        return self.expressions[line]

    def _constant(self, node: Node, other: Node) -> None:
        mine, its = (_attribute(n.graph.owning_module, str(n.target)) for n in (node, other))
        same = isinstance(mine, torch.Tensor) and isinstance(its, torch.Tensor) and mine.shape == its.shape
        if mine is not its and not (same and torch.equal(mine, its)):
            self._refuse(node, "a constant", "another constant")

    def _refuse(self, node: Node, here: Any, there: Any) -> NoReturn:
        at = f" ({where})" if (where := fx.where(node)) else ""
        raise LoweringError(
            f"{node.name}{at}: {here} at batch {self.batches[0]} is {there} at batch {self.batches[1]}, which is no "
            "a * batch + b. Export it with dynamic_batch=False, for the batch of the example inputs"
        )


def _attribute(module: Any, path: str) -> Any:
    return operator.attrgetter(path)(module)


def _line(first: int, second: int, batches: Pair) -> Pair:
    """a and b of a * batch + b."""
    slope, rest = divmod(second - first, batches[1] - batches[0])
    offset = first - slope * batches[0]
    # two points lie on some line, those of a square too; but nobody means a line that begins so far from 0
    if rest or slope < 0 or abs(offset) > (slope or abs(offset)):
        raise LoweringError(f"{first} at batch {batches[0]} and {second} at batch {batches[1]} are no a * batch + b")
    return slope, offset
