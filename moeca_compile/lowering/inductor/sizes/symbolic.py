"""Graphs of one form at several sizes -> one graph for any size, with torch's symbols as the sizes of its inputs.

Before: graphs that differ in whole numbers.  After: each number that differs is computed from the sizes of the inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.inductor.sizes.expressions import Dim, Evaluator, Expression, Finder

Numbers = tuple[int, ...]


class NotShared(Exception):
    """Why there is no graph for these sizes together."""


@dataclass(frozen=True)
class Rule:
    """How the numbers of a form follow from the sizes of the inputs.

    Attributes:
        numbers: at one size; those that don't change with the size are the same at every other.
        changing: expressions by position among the numbers.
        dims: the sizes that decide all others, with their positions among the numbers.
    """

    numbers: Numbers
    changing: Mapping[int, Expression]
    dims: Mapping[Dim, int]

    def sizes(self, numbers: Numbers) -> dict[Dim, int]:
        """The deciding sizes among the numbers of a graph."""
        return {dim: numbers[position] for dim, position in self.dims.items()}

    def gives(self, numbers: Numbers) -> bool:
        """Whether a graph with these numbers is the symbolic one at its sizes. A size of 1 is none of a symbol's: it is
        broadcast."""
        sizes = self.sizes(numbers)
        value = Evaluator(sizes.__getitem__).value
        changing = self.changing
        return min(sizes.values(), default=2) > 1 and all(
            number == (value(changing[i]) if i in changing else self.numbers[i]) for i, number in enumerate(numbers)
        )


def rule_of(samples: Sequence[Numbers], args: Sequence[Any]) -> Rule:
    """How these numbers, of graphs of one form, follow from sizes of `args`, the arguments of one of them.

    Raises:
        NotShared: a number follows from no size.
    """
    finder, changing, dims = Finder(), dict[int, Expression](), dict[Dim, int]()
    columns = list(zip(*samples, strict=True))
    for position, start, arg in _tensors(args):
        for axis in range(arg.dim()):
            column = columns[start + axis]
            if len(set(column)) > 1:
                changing[start + axis] = finder.add_dim(column, Dim(position, axis))
                dims.setdefault(Dim(position, axis), start + axis)
    pending = [i for i, column in enumerate(columns) if len(set(column)) > 1 and i not in changing]
    for find in (finder.find, finder.find, finder.part):  # what is found last may explain what came first
        for i in pending:
            if (found := find(columns[i])) is not None:
                changing[i] = found
        pending = [i for i in pending if i not in changing]
    if pending:
        values = " and ".join(map(str, columns[pending[0]]))
        raise NotShared(f"a number that is {values} follows from no size of an input")
    return Rule(samples[-1], changing, {dim: dims[dim] for dim in finder.dims})


def fakes_of(rule: Rule, args: Sequence[Any]) -> tuple[FakeTensorMode, list[Any], dict[Any, Dim]]:
    """Tensors like `args`, with symbols for the sizes that change.

    Returns:
        The mode of these tensors, the tensors, and what each symbol is the size of.

    Raises:
        NotShared: the size of a tensor subclass changes.
    """
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    symbols: dict[Any, Dim] = {}

    def size(dim: Dim) -> Any:
        source = ConstantSource(f"size_{dim.position}_{dim.axis}")
        hint = args[dim.position].shape[dim.axis]
        symbol = shapes.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        symbols[symbol] = dim
        return shapes.create_symintnode(symbol, hint=hint, source=source)

    value = Evaluator(size).value
    fakes = list(args)
    for position, start, arg in _tensors(args):
        numbers = range(start, start + 2 * arg.dim())
        if not any(i in rule.changing for i in numbers):
            fakes[position] = mode.from_tensor(arg, static_shapes=True)
            continue
        if type(arg) is not torch.Tensor:
            raise NotShared(f"a {type(arg).__name__} comes in several sizes")
        given = [value(rule.changing[i]) if i in rule.changing else rule.numbers[i] for i in numbers]
        with mode:
            shape, strides = given[: arg.dim()], given[arg.dim() :]
            fakes[position] = torch.empty_strided(shape, strides, dtype=arg.dtype, device=arg.device)
    return mode, fakes, symbols


def symbolic(gm: GraphModule, rule: Rule, args: Sequence[Any]) -> GraphModule:
    """A copy of a graph of the rule's form, with the numbers that change computed from the inputs' sizes."""
    gm = copy.deepcopy(gm)
    places = iter(range(sum(2 * arg.dim() for _, _, arg in _tensors(args)), len(rule.numbers)))
    inputs = fx.placeholders(gm)
    in_graph = _In(gm.graph, lambda dim: gm.graph.call_function(aten.sym_size.int, (inputs[dim.position], dim.axis)))
    extra: dict[str, list[Expression]] = {}  # by body, what its calls bring in addition
    for node in list(gm.graph.nodes):
        body = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, GraphModule):
            if node.target not in extra:
                extra[node.target] = _open_body(body, rule, places)
        elif node.op not in ("placeholder", "get_attr"):
            _replace(node, rule, places, in_graph.node)
    for node in list(gm.graph.nodes):
        callee = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(callee, Node) and callee.op == "get_attr" and extra.get(str(callee.target)):
            node.args = (*node.args, *map(in_graph.node, extra[str(callee.target)]))
    gm.graph.lint()
    gm.recompile()
    return gm


def _open_body(body: GraphModule, rule: Rule, places: Iterator[int]) -> list[Expression]:
    """Let a body take the numbers that change as further inputs; returns what they are, in order."""
    wanted: dict[Expression, Node] = {}
    last = fx.placeholders(body)[-1]

    def node_of(expression: Expression) -> Node:
        if expression not in wanted:
            with body.graph.inserting_after(next(reversed(wanted.values()), last)):
                wanted[expression] = body.graph.placeholder(f"size{len(wanted)}")
        return wanted[expression]

    for node in list(body.graph.nodes):
        if node.op not in ("placeholder", "get_attr"):
            _replace(node, rule, places, node_of)
    body.recompile()
    return list(wanted)


def _replace(node: Node, rule: Rule, places: Iterator[int], node_of: Callable[[Expression], Node]) -> None:
    def replaced(value: Any) -> Any:
        if type(value) is not int:
            return value
        expression = rule.changing.get(next(places))
        return value if expression is None else node_of(expression)

    args = map_aggregate(node.args, replaced)
    node.args, node.kwargs = args, map_aggregate(node.kwargs, replaced)


class _In:
    """Expressions as nodes of a graph, ahead of what reads them."""

    def __init__(self, graph: Graph, size: Callable[[Dim], Node]) -> None:
        self._graph = graph
        self._body = next(node for node in graph.nodes if node.op != "placeholder")
        tracer = GraphAppendingTracer(graph)
        self._evaluator = Evaluator(lambda dim: Proxy(size(dim), tracer))

    def node(self, expression: Expression) -> Node:
        with self._graph.inserting_before(self._body):
            proxy: Proxy = self._evaluator.value(expression)
        return proxy.node


def _tensors(args: Sequence[Any]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The tensors among arguments: their position, where their sizes and strides begin among the numbers, and they."""
    start = 0
    for position, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            yield position, start, arg
            start += 2 * arg.dim()
