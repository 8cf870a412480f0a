"""Plain torch code as nodes of a graph: what a rewrite does to values is written as one would write it for tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from moeca_compile.graph import fx

_TRACES: weakref.WeakKeyDictionary[FakeTensorMode, dict[Any, tuple[GraphModule, list[str]]]] = (
    weakref.WeakKeyDictionary()
)


def inline(gm: GraphModule, function: Callable[..., dict[str, torch.Tensor]], **arguments: Any) -> dict[str, Node]:
    """Add what `function` does with tensors, at the insertion point: plain torch code becomes nodes.

    A graph has many equal layers: what was traced for one serves all.

    Args:
        gm: the graph, changed in place.
        function: gives tensors by name.
        arguments: its arguments: nodes (in dicts too) in place of tensors, anything else hashable.

    Returns:
        The new nodes by the names that `function` gives.
    """
    leaves, spec = tree_flatten(arguments)
    nodes = [leaf for leaf in leaves if isinstance(leaf, Node)]
    values = [fx.need(node) for node in nodes]
    kinds = tuple((v.shape, v.dtype, v.device) for v in values)
    key = (function, spec, tuple(None if isinstance(leaf, Node) else (type(leaf), leaf) for leaf in leaves), kinds)
    mode = fx.fake_mode(values)
    traces = {} if mode is None else _TRACES.setdefault(mode, {})
    if key not in traces:
        names: list[str] = []

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            remaining = iter(tensors)
            filled = [next(remaining) if isinstance(leaf, Node) else leaf for leaf in leaves]
            result = function(**tree_unflatten(filled, spec))
            names[:] = result
            return tuple(result.values())

        with fx.fake_mode_of(values), torch.no_grad(), _use_lazy_graph_module(True):
            traces[key] = make_fx(run, pre_dispatch=True)(*values), names
    traced, names = traces[key]
    copies: dict[Node, Node] = dict(zip(fx.placeholders(traced), nodes, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            copies[node] = gm.graph.node_copy(node, lambda source: copies[source])
        elif node.op == "get_attr":
            copies[node] = constant(gm, getattr(traced, str(node.target)), values[0])
    results = fx.nodes_of(fx.output_node(traced).args[0])
    return {name: copies[node] for name, node in zip(names, results, strict=True)}


def constant(gm: GraphModule, tensor: torch.Tensor, like: torch.Tensor) -> Node:
    """A real tensor that belongs to the graph, at the insertion point; its `meta` is in the mode of `like`."""
    name = f"moeca_constant_{sum(key.startswith('moeca_constant') for key in dict(gm.named_buffers()))}"
    gm.register_buffer(name, tensor)
    node = gm.graph.get_attr(name)
    mode = fx.fake_mode(like)
    node.meta["val"] = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    return node
