"""Weights that the model holds in 8 or 4 bits stay so in the file, and are multiplied by in the form of `forms.py`.

Folded with other constants, they would become floating-point numbers four or eight times as large.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Interpreter, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.onnx.quantized import forms
from moeca_compile.lowering.onnx.quantized.affine import Affine, affine_of
from moeca_compile.lowering.onnx.request import OnnxRequest

WIDENED = "moeca_widened"  # in the meta of a graph: names of quantized weights that become floating-point numbers
_STORED = (torch.int8, torch.uint8)
_SMALL = 256  # elements
_HALF_OPSET = 19  # from which on DequantizeLinear gives float16
_MADE = "moeca_quantized"  # in the meta of a graph: names of the attributes that are made here


class _Place(NamedTuple):
    """Which arguments of a product are what; whether the weight is [K, N]."""

    x: int
    weight: int
    is_transposed: bool
    bias: int


_PRODUCTS: dict[Any, _Place] = {
    aten.linear.default: _Place(0, 1, False, 2),
    aten.mm.default: _Place(0, 1, True, 2),
    aten.matmul.default: _Place(0, 1, True, 2),
    aten.addmm.default: _Place(1, 2, True, 0),
}


def keep_quantized(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """Does nothing where no weight is of 8-bit integers."""
    stored = {node for node in gm.graph.nodes if node.op == "get_attr" and _constant(gm, node).dtype in _STORED}
    if stored:
        keeping = _Keeping(gm, request, stored)
        for node in list(gm.graph.nodes):
            keeping.weight(node)
        gm.graph.eliminate_dead_code()
    gm.meta[WIDENED] = frozenset(
        str(node.target)
        for node in gm.graph.nodes
        if node.op == "get_attr" and node.users and _is_widened(node, _constant(gm, node))
    )
    return gm


def _constant(gm: GraphModule, node: Node) -> Tensor:
    value: Tensor = operator.attrgetter(str(node.target))(gm)
    return value


def _is_widened(node: Node, value: Tensor) -> bool:
    """Whether it is of 8-bit numbers, and floating-point numbers are made of it."""
    if value.dtype.itemsize > 1 or value.dtype == torch.bool or value.numel() < _SMALL:
        return False
    made = [fx.tensor(user) for user in node.users if user.target not in forms.VALUES]
    return any(result is None or result.dtype.itemsize > 1 or result.numel() < value.numel() for result in made)


class _Keeping:
    """The constants of a graph, and who reads them."""

    def __init__(self, gm: GraphModule, request: OnnxRequest, stored: set[Node]) -> None:
        self.gm, self.request, self.stored = gm, request, stored
        self.sources: dict[Node, set[Node]] = {}  # of each value that follows from constants alone, those constants
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                self.sources[node] = {node}
            elif isinstance(node.target, OpOverload) and node.all_input_nodes:
                parts = [self.sources[source] for source in node.all_input_nodes if source in self.sources]
                if len(parts) == len(node.all_input_nodes):
                    self.sources[node] = set().union(*parts)

    def weight(self, node: Node) -> None:
        """Keep a value, if it is a quantized weight, for those who read it and are no constants themselves."""
        users = [user for user in node.users if user not in self.sources and user.op == "call_function"]
        held = [source for source in self.sources.get(node, ()) if source in self.stored]
        value = fx.tensor(node)
        if not users or not held or value is None or value.dim() != 2 or not self._has_form(value.dtype):
            return
        largest = max(held, key=lambda source: _constant(self.gm, source).numel())
        for user in users:
            place = _PRODUCTS.get(user.target)
            if place is not None and user.args[place.weight] is not node:
                place = None  # it is multiplied, not multiplied by
            is_transposed = place is not None and place.is_transposed
            affine = affine_of(partial(self._value, node, largest), _constant(self.gm, largest), is_transposed)
            if affine is None:
                continue
            if place is not None:
                self._write_product(user, place, affine)
            else:
                user.replace_input_with(node, self._write_weight(user, affine))

    def _has_form(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float32 or (dtype == torch.float16 and self.request.opset >= _HALF_OPSET)

    def _value(self, node: Node, replaced: Node | None = None, by: Tensor | None = None) -> Tensor:
        """A constant, with one of the constants that it follows from replaced by another."""
        run = Interpreter(self.gm, garbage_collect_values=False)
        run.env = {source: by if source is replaced else _constant(self.gm, source) for source in self.sources[node]}
        waiting = [node]
        while waiting:
            missing = [source for source in waiting[-1].all_input_nodes if source not in run.env]
            if waiting[-1] in run.env or not missing:
                one = waiting.pop()
                if one not in run.env:
                    run.env[one] = run.run_node(one)
            waiting += missing
        result: Tensor = run.env[node]
        return result

    def _write_product(self, user: Node, place: _Place, affine: Affine) -> None:
        bias = user.args[place.bias] if len(user.args) > place.bias else user.kwargs.get("bias")
        last = user
        if bias is None and (scaled := self._scaled(user)) is not None:
            last, factor = scaled
            affine = affine.times(factor)
        x = user.args[place.x]
        weight = self._write_weight(last, affine, is_product=True)
        with self.gm.graph.inserting_before(last):
            new = fx.call(self.gm, forms.product, (x, weight, bias), like=user)
        last.replace_all_uses_with(new)

    def _scaled(self, product: Node) -> tuple[Node, Tensor] | None:
        """The multiplication by a number for each output channel that all of a product goes through."""
        last = next(iter(product.users))
        if len(product.users) > 1 or last.target is not aten.mul.Tensor:
            return None
        factors = [one for one in fx.nodes_of(last.args) if one is not product]
        if len(factors) != 1 or factors[0] not in self.sources or fx.shape(last) != fx.shape(product):
            return None
        factor = self._value(factors[0])
        width = fx.shape(product)[-1]
        fits = factor.numel() == 1 or (factor.numel() == width and factor.shape[-1] == width)
        return (last, factor) if fits and factor.dtype == fx.need(product).dtype else None

    def _write_weight(self, user: Node, affine: Affine, is_product: bool = False) -> Node:
        """The weight [N, K] as a value that `user` reads."""
        is_product |= fx.is_experts(user) and self.request.experts.name == "segments"
        has_operator = self.request.experts.has_nbits and affine.scale.dtype == torch.float32
        form, made = forms.dequantized, forms.rows_of(affine)
        if is_product and has_operator and affine.bits == 4 and forms.nbits_block(affine):
            form, made = forms.weight_4_bits, forms.packed(affine)
        with self.gm.graph.inserting_before(user):
            return fx.call(self.gm, form, (self._constants(user, made), *affine.integers.shape), like=user)

    def _constants(self, before: Node, tensors: Sequence[Tensor]) -> list[Node]:
        """Tensors as attributes of the graph."""
        nodes = []
        for tensor in tensors:
            name = f"quantized_{len(self.gm.meta.setdefault(_MADE, []))}"
            self.gm.meta[_MADE].append(name)
            self.gm.register_buffer(name, tensor)
            with self.gm.graph.inserting_before(before):
                node = self.gm.graph.get_attr(name)
            with fx.fake_mode_of([fx.value(before)]) as mode:
                node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
            nodes.append(node)
        return nodes
