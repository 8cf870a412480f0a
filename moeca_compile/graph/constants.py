"""Numbers that a model reads out of tensors which it made of constants: image sizes, tokens per expert.

`torch.tensor([h, w]).repeat(b, 1)` and then `x[:h * w]` is no dependence on data, but a tracer, which sees tensors
without values, takes it for one. What depends on no tensor from outside is computed here, for real, before tracing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Number = int | float | bool

_TAKE_SIZES = {
    "reshape", "view", "expand", "repeat", "tile", "narrow", "unflatten", "split", "getitem", "zeros", "ones", "empty",
    "arange", "new_zeros", "new_ones", "new_empty", "repeat_interleave",
}  # fmt: skip
_CHANGE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior
}  # fmt: skip


def constants_of(gm: GraphModule, args: Sequence[Any]) -> dict[Node, Number]:
    """The numbers in a Dynamo graph that are the same for all tensors of these shapes: what `item()` gives, and 0-d
    integer tensors that are used as sizes. Arguments that are numbers count as known."""
    arguments = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), args, strict=True))
    values: dict[Node, Any] = {node: arg for node, arg in arguments.items() if not isinstance(arg, torch.Tensor)}
    constant_nodes = set(values)
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and constant_nodes.issuperset(node.all_input_nodes):
            constant_nodes.add(node)
    computed = [node for node in gm.graph.nodes if node in constant_nodes and node not in values]
    candidates = [node for node in computed if node.target == "item" or _is_a_size(node, constant_nodes)]
    constants: dict[Node, Number] = {}
    for node in candidates:
        sources = _cone([node], lambda n: n.all_input_nodes)
        if not _changed(sources - set(values)) and _compute(gm, sources, values):
            value = values[node]
            if not isinstance(value, torch.Tensor):
                constants[node] = value
            elif value.dim() == 0 and not value.is_floating_point() and not value.is_complex():
                constants[node] = int(value)
    return constants


def takes_sizes(node: Node) -> bool:
    """Whether a 0-d integer tensor among a call's arguments stands for a number."""
    return getattr(node.target, "__name__", node.target) in _TAKE_SIZES


def _is_a_size(node: Node, constant_nodes: set[Node]) -> bool:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() or value.is_floating_point():
        return False
    return any(takes_sizes(user) and user not in constant_nodes for user in node.users)


def _cone(start: Iterable[Node], step: Any) -> set[Node]:
    reached = set(start)
    pending = list(reached)
    while pending:
        new = [node for node in step(pending.pop()) if node not in reached]
        reached.update(new)
        pending += new
    return reached


def _changed(nodes: set[Node]) -> bool:
    """Whether one of these values, or a view of one, is changed in place anywhere in the graph."""
    below = _cone(nodes, lambda node: [] if node.target == "item" else node.users)
    for node in below:
        name = node.target if isinstance(node.target, str) else ""
        in_place = node.target in _CHANGE or (name.endswith("_") and not name.endswith("__"))
        targets = [node.kwargs.get("out"), *(node.args[:1] if in_place else ())]
        if any(isinstance(target, Node) and target in below for target in targets):
            return True
    return False


class _Steady(TorchDispatchMode):
    """Refuses what gives another value each time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.__name__:
            raise _Unsteady
        return func(*args, **(kwargs or {}))


class _Unsteady(Exception):
    pass


class _WithData(TorchFunctionMode):
    """Makes on the CPU what a model on the meta device, which has no data, makes of constants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.device, _with_data, (args, kwargs or {}))
        return func(*args, **kwargs)


def _with_data(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _compute(gm: GraphModule, nodes: set[Node], values: dict[Node, Any]) -> bool:
    """Compute these nodes for real, into `values`; False if one of them isn't the same each time."""
    run = Interpreter(gm, garbage_collect_values=False)
    run.env = values
    with torch.no_grad(), _WithData(), _Steady():  # type: ignore[no-untyped-call]
        for node in gm.graph.nodes:
            if node in nodes and node not in values:
                try:
                    values[node] = run.run_node(node)
                except _Unsteady:
                    return False
    return True
