"""Tensor subclasses among a graph's inputs, such as quantised weights, taken apart into the plain tensors they hold.

AOTAutograd does the same. The graph gets a placeholder for each plain tensor and puts the subclass together itself;
traced, that leaves what the subclass computes, in ordinary operators. Everything behind sees plain tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._dynamo.source import AttrSource
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Flatten = Callable[[Sequence[Any]], Sequence[Any]]
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_Tree = Node | tuple[Callable[..., Any], list[Any]]


def desugar(gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[GraphModule, Flatten]:
    """The graph of plain tensors, and what turns the arguments of Dynamo's graph into those of this one."""
    wrapped = [is_traceable_wrapper_subclass(example) for example in example_inputs]
    if not any(wrapped):
        return gm, _unchanged
    graph = Graph()
    copies: dict[Node, Node] = {}
    parts: dict[Node, Any] = {}
    examples = iter(example_inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            example, source = next(examples), getattr(node, "_dynamo_source", None)
            if is_traceable_wrapper_subclass(example):
                parts[node] = _placeholders(graph, node.name, source, example)
            else:
                copies[node] = graph.node_copy(node)
                copies[node]._dynamo_source = source
            continue
        for subclass_node, tree in parts.items():
            copies[subclass_node] = _assembled(graph, tree)
        parts.clear()
        copies[node] = graph.node_copy(node, copies.__getitem__)
    plain = GraphModule(gm, graph)
    vars(plain)["compile_subgraph_reason"] = getattr(gm, "compile_subgraph_reason", None)

    def flatten(args: Sequence[Any]) -> Sequence[Any]:
        flat: list[Any] = []
        for arg, is_wrapped in zip(args, wrapped, strict=True):
            if is_wrapped:
                flat.extend(plain_parts(arg))
            else:
                flat.append(arg)
        return flat

    return plain, flatten


def _unchanged(args: Sequence[Any]) -> Sequence[Any]:
    return args


def plain_parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The plain tensors in a subclass, in the order of its attributes; a plain tensor itself."""
    if type(tensor) in _PLAIN or not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if part is not None:
            yield from plain_parts(part)


def _placeholders(graph: Graph, name: str, source: Any, example: Any) -> _Tree:
    """A placeholder for each plain tensor in `example`, and how they are put together."""
    if not is_traceable_wrapper_subclass(example):
        part = graph.placeholder(name)
        part._dynamo_source = source
        return part
    names, context = example.__tensor_flatten__()
    names = [attribute for attribute in names if getattr(example, attribute) is not None]
    parts = [
        _placeholders(
            graph, f"{name}_{attribute}", source and AttrSource(source, attribute), getattr(example, attribute)
        )
        for attribute in names
    ]
    kind, size, stride = type(example), example.size(), example.stride()

    def assemble(*tensors: torch.Tensor) -> Any:
        return kind.__tensor_unflatten__(dict(zip(names, tensors, strict=True)), context, size, stride)

    return assemble, parts


def _assembled(graph: Graph, tree: _Tree) -> Node:
    if isinstance(tree, Node):
        return tree
    assemble, parts = tree
    return graph.call_function(assemble, tuple(_assembled(graph, part) for part in parts))
