"""Complex numbers as pairs of real ones, last dimension first real then imaginary: ONNX runtimes have no complex types.

For rotary embeddings, which models write as a product of complex numbers: views, parts, sums and products of them.
Weights are constants already.
Does nothing where nothing is complex.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moeca_compile.errors import LoweringError
from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.onnx.origins import Origin, origins_of
from moeca_compile.lowering.onnx.request import OnnxRequest


def without_complex(gm: GraphModule, request: OnnxRequest) -> GraphModule:
    """
    Raises:
        LoweringError: a complex operator without a form here, or a complex input or output.
    """
    real: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "output" or not (_is_complex(node) or any(map(_is_complex, node.all_input_nodes))):
            continue
        with gm.graph.inserting_before(node):
            if node.op == "get_attr":
                value = getattr(gm, str(node.target))
                gm.register_buffer(f"{node.target}_real", torch.view_as_real(value.resolve_conj()).contiguous())
                origin = origins_of(gm).get(str(node.target), Origin())
                origins_of(gm)[f"{node.target}_real"] = Origin(origin.parameters)
                real[node] = gm.graph.get_attr(f"{node.target}_real")
            elif node.target is aten.view_as_complex.default:
                real[node] = fx.arg(node, 0)
            elif node.target in _FORMS:
                target, args = _FORMS[node.target](node, lambda one: real.get(one, one))
                real[node] = gm.graph.call_function(target, args)
            else:
                raise LoweringError(
                    f"{node.name} ({fx.where(node)}): {node.target} on complex numbers has no ONNX form"
                )
        if not _is_complex(node):  # back to real numbers
            node.replace_all_uses_with(real[node])
    for node in reversed(list(gm.graph.nodes)):
        if node in real and not node.users:
            gm.graph.erase_node(node)
    return gm


def _is_complex(node: Node) -> bool:
    val = fx.value(node)
    return isinstance(val, torch.Tensor) and val.is_complex()


def product(a: Tensor, b: Tensor | float, both: bool) -> Tensor:
    """Of pairs [..., 2]; or of pairs `a` and real numbers `b` [...]."""
    if not isinstance(b, Tensor):
        return a * b
    if not both:
        return a * b.unsqueeze(-1)
    (x, y), (u, v) = a.unbind(-1), b.unbind(-1)
    return torch.stack([x * u - y * v, x * v + y * u], dim=-1)


_Get = Callable[[Any], Any]
_Form = Callable[[Node, _Get], tuple[Any, tuple[Any, ...]]]


def _product(node: Node, real: _Get) -> tuple[Any, tuple[Any, ...]]:
    a, b = node.args[0], node.args[1]
    pairs = [isinstance(one, Node) and _is_complex(one) for one in (a, b)]
    if not pairs[0]:
        a, b = b, a
    return product, (real(a), real(b) if isinstance(b, Node) else b, all(pairs))


def _sized(node: Node, real: _Get) -> tuple[Any, tuple[Any, ...]]:
    """A list of sizes is the second argument: 2 more."""
    sizes: Any = node.args[1]
    return node.target, (real(node.args[0]), [*sizes, 2])


def _along(place: int, default: int | None = None) -> _Form:
    """The dimension that argument `place` names is counted from the front."""

    def form(node: Node, real: _Get) -> tuple[Any, tuple[Any, ...]]:
        args = list(node.args)
        rank = len(fx.shape(fx.arg(node, 0) if isinstance(args[0], Node) else args[0][0]))  # type: ignore[index,arg-type]
        if len(args) <= place and default is not None:
            args.append(default)
        dim: Any = args[place]
        args[place] = dim + rank + (node.target is aten.unsqueeze.default) if dim < 0 else dim
        args[0] = [real(one) for one in fx.nodes_of(args[0])] if not isinstance(args[0], Node) else real(args[0])
        return node.target, tuple(args)

    return form


_FORMS: dict[Any, _Form] = {
    aten.view_as_real.default: lambda node, real: (aten.alias.default, (real(node.args[0]),)),
    aten.clone.default: lambda node, real: (aten.clone.default, (real(node.args[0]),)),
    aten.index.Tensor: lambda node, real: (aten.index.Tensor, (real(node.args[0]), *node.args[1:])),
    aten.mul.Tensor: _product,
    aten.view.default: _sized,
    aten.reshape.default: _sized,
    aten.expand.default: _sized,
    aten.unsqueeze.default: _along(1),
    aten.slice.Tensor: _along(1, 0),
    aten.select.int: _along(1),
    aten.cat.default: _along(1, 0),
}
