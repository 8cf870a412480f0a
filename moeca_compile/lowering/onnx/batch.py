"""One graph for every batch, out of some that were captured for a concrete one.

Captures hold sizes as numbers. Where the same graph has different numbers at different batches, they must be a * batch
+ b at all of them, of which there are three or more: two numbers lie on some line whatever they are. Each becomes an
expression of the batch that an input brings. Whatever else differs can't be said, and is refused.
Does nothing where there is one capture.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch.fx import GraphModule, Node

from moeca_compile.errors import InvariantError, LoweringError
from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.onnx.request import OnnxRequest
from moeca_compile.runtime.bundle.dims import Dim, expression

Batches = tuple[int, ...]  # one capture at each
FEWEST = 3


def dims(shapes: Sequence[Sequence[int]], batches: Batches) -> tuple[Dim, ...]:
    """A shape at several batches as one of sizes and expressions; a single one is that of its batch.

    Raises:
        LoweringError: no expression a * batch + b gives them all.
    """
    if len({len(one) for one in shapes}) != 1:
        raise LoweringError(f"{_each(shapes, batches)}: the number of dimensions depends on the batch")
    return tuple(expression(*_line(sizes, batches)) for sizes in zip(*shapes, strict=True))


def any_batch(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """Make the first of the request's graphs, which `gm` is a copy of, take any batch.

    Raises:
        LoweringError: the graphs differ in more than in sizes that are linear in the batch.
    """
    batches, others = request.batches, request.graphs[1:]
    if not others:
        return gm
    sides = [list(one.graph.nodes) for one in (gm, *others)]
    for batch, other in zip(batches[1:], sides[1:], strict=True):
        pairs = zip(sides[0], other, strict=False)
        different = next((n for n, o in pairs if (n.op, n.target) != (o.op, o.target)), None)
        if different is not None or len(sides[0]) != len(other):
            at = f" from {different.name} ({fx.where(different)}) on" if different is not None else ""
            raise LoweringError(
                f"the model's graph at batch {batches[0]} isn't the one at batch {batch}{at}: it branches on "
                "its batch, or loops over it. Export it with dynamic_batch=False"
            )
    rows = list(zip(*sides, strict=True))
    rewrite = _Rewrite(gm, rows, batches)
    for row in rows:
        rewrite.node(row)
    return gm


class _Rewrite:
    """`rows`: of each node of the graph its likes, itself first."""

    def __init__(self, gm: GraphModule, rows: Sequence[tuple[Node, ...]], batches: Batches) -> None:
        self.gm, self.batches = gm, batches
        self.known = set(rows)
        self.expressions: dict[tuple[int, int], Node] = {}
        self.body = next(node for node in gm.graph.nodes if node.op != "placeholder")
        self.source = next(
            (
                (row[0], dim)
                for row in rows
                if row[0].op == "placeholder"
                for dim, sizes in enumerate(zip(*map(fx.shape, row), strict=False))
                if sizes == batches
            ),
            None,
        )

    def node(self, row: tuple[Node, ...]) -> None:
        if row[0].op == "get_attr":
            self._constant(row)
        elif row[0].op == "call_function":
            row[0].args = self._match(tuple(node.args for node in row), row[0])
            row[0].kwargs = self._match(tuple(node.kwargs for node in row), row[0])

    def _match(self, values: tuple[Any, ...], node: Node) -> Any:
        first = values[0]
        if isinstance(first, Node):
            if all(isinstance(one, Node) for one in values) and values in self.known:
                return first
        elif isinstance(first, (list, tuple)):
            if all(isinstance(one, (list, tuple)) and len(one) == len(first) for one in values):
                return type(first)(self._match(likes, node) for likes in zip(*values, strict=True))
        elif isinstance(first, dict):
            if all(isinstance(one, dict) and one.keys() == first.keys() for one in values):
                return {name: self._match(tuple(one[name] for one in values), node) for name in first}
        elif all(type(one) is int for one in values):
            return first if len(set(values)) == 1 else self._expression(values, node)
        elif all(type(one) is type(first) and (one == first or (one != one and first != first)) for one in values):
            return first
        self._refuse(node, values)

    def _expression(self, values: tuple[int, ...], node: Node) -> Node:
        try:
            line = _line(values, self.batches)
        except LoweringError:
            self._refuse(node, values)
        if self.source is None:
            self._refuse(node, values)
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

    def _constant(self, row: tuple[Node, ...]) -> None:
        mine, *others = (_attribute(node.graph.owning_module, str(node.target)) for node in row)
        for other in others:
            same = isinstance(mine, torch.Tensor) and isinstance(other, torch.Tensor) and mine.shape == other.shape
            if mine is not other and not (same and torch.equal(mine, other)):
                self._refuse(row[0], ("a constant", *["another constant"] * len(others)))

    def _refuse(self, node: Node, values: Sequence[Any]) -> NoReturn:
        at = f" ({where})" if (where := fx.where(node)) else ""
        raise LoweringError(
            f"{node.name}{at}: {_each(values, self.batches)}, which is no a * batch + b. Export it with "
            "dynamic_batch=False, for the batch of the example inputs"
        )


def _attribute(module: Any, path: str) -> Any:
    return operator.attrgetter(path)(module)


def _line(sizes: Sequence[int], batches: Batches) -> tuple[int, int]:
    """a and b of a * batch + b."""
    if len(set(sizes)) == 1:
        return 0, sizes[0]
    if len(batches) < FEWEST:
        raise InvariantError(f"{len(batches)} captures don't show whether a size is linear in the batch")
    slope, rest = divmod(sizes[1] - sizes[0], batches[1] - batches[0])
    offset = sizes[0] - slope * batches[0]
    if rest or slope < 0 or any(slope * batch + offset != size for batch, size in zip(batches, sizes, strict=True)):
        raise LoweringError(f"{_each(sizes, batches)}, which is no a * batch + b")
    return slope, offset


def _each(values: Sequence[Any], batches: Batches) -> str:
    """What stands there at each batch."""
    if len(values) == 1:
        return f"{values[0]}"
    return ", ".join(f"{one} at batch {batch}" for one, batch in zip(values, batches, strict=True))
