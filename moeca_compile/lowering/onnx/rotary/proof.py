"""The proof that a node turns channels in pairs: each of its elements is looked at.

    out = x * cos + partner(x) * sin, where a pair's members have the same cosine, and sines that are opposite numbers

However a model writes it (stacked halves, neighbors, slices that are written to, complex numbers), each element of the
result is a sum of two products. Labels of elements (`elements.py`) say of what.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.onnx.rotary.elements import Elements, is_move, moved, operands
from moeca_compile.lowering.onnx.rotary.forms import Layout, Place, half_of

SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
EMPTY = frozenset({aten.empty_like.default, aten.zeros_like.default})  # what slices are written to
_Term = tuple[Tensor, Tensor]  # of a product: the labels of x, those of the table


@dataclass(frozen=True)
class Half:
    """One number for each pair, by `half_of`.

    Attributes:
        table: the node that holds them; one of complex numbers stands for their parts.
        place: where they are in it.
        sign: 1 or -1, times which they are meant.
        labels: of the numbers, [sequences, tokens, D / 2].
    """

    table: Node
    place: Place
    sign: int
    labels: Tensor


@dataclass(frozen=True)
class Rotation:
    """Attributes:
    x: what is turned.
    """

    x: Node
    layout: Layout
    cos: Half
    sin: Half


def factor_of(product: Node, table: Node) -> Node:
    """The factor that isn't the table."""
    return next(one for one in product.all_input_nodes if one is not table)


class Proof:
    """That `root` turns `x` by angles of which `tables` has cosines and sines, a table for each product."""

    def __init__(self, root: Node, x: Node, tables: Mapping[Node, Node], elements: Elements) -> None:
        self.root, self.x, self.tables, self.elements = root, x, tables, elements
        self.count = fx.need(x).numel()
        self.places: dict[Node, Any] = {x: torch.arange(1, self.count + 1).reshape(fx.shape(x))}
        self.terms: dict[Node, Sequence[_Term]] = {}

    def rotation(self) -> Rotation | None:
        terms = self._terms(self.root)
        if len(terms) != 2:
            return None
        (x, table), (other_x, other_table) = [(one.flatten(), two.flatten()) for one, two in terms]
        place = torch.arange(1, self.count + 1)
        is_own = x.abs() == place
        x, other_x = torch.where(is_own, x, other_x), torch.where(is_own, other_x, x)
        cos, sin = torch.where(is_own, table, other_table), torch.where(is_own, other_table, table)
        if not torch.equal(x.abs(), place):
            return None
        cos, sin, partner = cos * x.sign(), sin * other_x.sign(), other_x.abs() - 1
        for layout in self._layouts(int(partner[0])):
            width, place = layout.width, torch.arange(self.count)
            apart = torch.where(place % width < width // 2, place + width // 2, place - width // 2)
            if not torch.equal(partner, place ^ 1 if layout.interleaved else apart):
                continue
            (cos_0, cos_1), (sin_0, sin_1) = (self._members(one, layout) for one in (cos, sin))
            if torch.equal(cos_0, cos_1) and torch.equal(sin_0, -sin_1):
                halves = [self._half(one, layout) for one in (cos_0, sin_1)]
                if halves[0] is not None and halves[1] is not None:
                    return Rotation(self.x, layout, halves[0], halves[1])
        return None

    def _layouts(self, distance: int) -> Iterator[Layout]:
        """Those that x can have, if a pair's members are that far apart."""
        shape = fx.shape(self.x)
        for rank in (len(shape) - 1, len(shape) - 2):
            lead, width = shape[:rank], math.prod(shape[rank:])
            fits = distance == 1 or 2 * distance == width
            if rank in (2, 3) and lead == fx.shape(self.root)[:rank] and width % 2 == 0 and fits:
                for heads in (None,) if rank == 2 else (2, 1):
                    yield Layout(rank, heads, 1 if heads is None else lead[heads], width, distance == 1)

    def _members(self, table: Tensor, layout: Layout) -> Sequence[Tensor]:
        """Of the first and of the second members of pairs [*lead, D / 2]."""
        rows = table.reshape(*fx.shape(self.x)[: layout.rank], layout.width)
        return (rows[..., 0::2], rows[..., 1::2]) if layout.interleaved else rows.chunk(2, dim=-1)

    def _half(self, labels: Tensor, layout: Layout) -> Half | None:
        """Where these numbers [*lead, D / 2] are, if they are the same for all heads."""
        if layout.heads is not None:
            first = labels.narrow(layout.heads, 0, 1)
            if not torch.equal(first.expand_as(labels), labels):
                return None
            labels = first.squeeze(layout.heads)
        size, x = labels.shape[-1], self.places[self.x]
        for table in dict.fromkeys(self.tables.values()):
            numbers = self.elements.real(table)
            for part in (slice(None), slice(0, None, 2), slice(1, None, 2), slice(size), slice(size, None), 0, 1):
                try:
                    found = half_of(numbers, x, (..., part), layout)
                except (RuntimeError, IndexError):  # there is no such part
                    continue
                for sign in (1, -1):
                    if torch.equal(sign * found, labels):
                        return Half(table, (..., part), sign, labels)
        return None

    def _terms(self, node: Node) -> Sequence[_Term]:
        """The products of which a node's elements are sums."""
        if node not in self.terms:
            self.terms[node] = self._made(node)
        return self.terms[node]

    def _made(self, node: Node) -> Sequence[_Term]:
        shape = fx.shape(node)
        if node in self.tables:
            terms = [(self._x(node), self.elements.real(self.tables[node]))]
        elif node.target is aten.view_as_real.default:
            terms = self._complex_product(fx.arg(node, 0))
        elif node.target in EMPTY:
            terms = []
        elif node.target in SUMS:
            left, right = self._terms(fx.arg(node, 0)), self._terms(fx.arg(node, 1))
            sign = -1 if node.target is aten.sub.Tensor else 1
            terms = [*left, *((sign * x, table) for x, table in right)]
        else:
            count = max(len(self._terms(source)) for source in operands(node))
            terms = [(self._moved(node, term, 0), self._moved(node, term, 1)) for term in range(count)]
        return [(x.expand(shape), table.expand(shape)) for x, table in terms]

    def _complex_product(self, mul: Node) -> list[_Term]:
        """(a, b) times (cos, sin): (a, b) * cos + (-b, a) * sin."""
        table = self.tables[mul]
        if (
            factor_of(mul, self.tables[mul]).target is not aten.view_as_complex.default
            or not fx.need(table).is_complex()
        ):
            return []
        x, parts = self._x(mul), self.elements.real(table)
        return [(x, parts[..., :1]), (torch.stack([-x[..., 1], x[..., 0]], dim=-1), parts[..., 1:])]

    def _moved(self, node: Node, term: int, side: int) -> Any:
        def labels(source: Node) -> Any:
            terms = self._terms(source)
            return terms[term][side] if term < len(terms) else torch.zeros(fx.shape(source), dtype=torch.int64)

        return moved(node, labels)

    def _x(self, mul: Node) -> Tensor:
        """Which elements of x a product has, counted from 1."""
        factor = factor_of(mul, self.tables[mul])
        found: Tensor = self._place(fx.arg(factor, 0) if factor.target is aten.view_as_complex.default else factor)
        return found

    def _place(self, node: Node) -> Any:
        if node not in self.places:
            self.places[node] = moved(node, self._place) if is_move(node) else _nowhere(fx.value(node))
        return self.places[node]


def _nowhere(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=torch.int64) if isinstance(value, Tensor) else tuple(map(_nowhere, value))
