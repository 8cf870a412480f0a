"""Numbers that a model reads out of tensors which it made of constants: image sizes, tokens per expert.

`torch.tensor([h, w]).repeat(b, 1)` and then `x[:h * w]` is no dependence on data, but a tracer, which sees tensors
without values, takes it for one. What hangs on no tensor from outside is computed here, for real, before tracing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode

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
    known = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), args, strict=True))
    env: dict[Node, Any] = {node: arg for node, arg in known.items() if not isinstance(arg, torch.Tensor)}
    fixed = set(env)
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
    wanted = [n for n in gm.graph.nodes if n in fixed and n not in env and (n.target == "item" or _is_a_size(n, fixed))]
    found: dict[Node, Number] = {}
    for node in wanted:
        above = _cone([node], lambda n: n.all_input_nodes)
        if not _changed(above - set(env)) and _compute(gm, above, env):
            value = env[node]
            if not isinstance(value, torch.Tensor):
                found[node] = value
            elif value.dim() == 0 and not value.is_floating_point() and not value.is_complex():
                found[node] = int(value)
    return found


def takes_sizes(node: Node) -> bool:
    """Whether a 0-d integer tensor among a call's arguments stands for a number."""
    return getattr(node.target, "__name__", node.target) in _TAKE_SIZES


def _is_a_size(node: Node, fixed: set[Node]) -> bool:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() or value.is_floating_point():
        return False
    return any(takes_sizes(user) and user not in fixed for user in node.users)


def _cone(start: Iterable[Node], step: Any) -> set[Node]:
    seen = set(start)
    front = list(seen)
    while front:
        new = [node for node in step(front.pop()) if node not in seen]
        seen.update(new)
        front += new
    return seen


def _changed(nodes: set[Node]) -> bool:
    """Whether one of these values, or a view of one, is changed in place anywhere in the graph."""
    below = _cone(nodes, lambda node: [] if node.target == "item" else node.users)
    for node in below:
        name = node.target if isinstance(node.target, str) else ""
        in_place = node.target in _CHANGE or (name.endswith("_") and not name.endswith("__"))
        changed = [node.kwargs.get("out"), *(node.args[:1] if in_place else ())]
        if any(isinstance(one, Node) and one in below for one in changed):
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


def _compute(gm: GraphModule, nodes: set[Node], env: dict[Node, Any]) -> bool:
    """Compute these nodes for real, into `env`; False if one of them isn't the same each time."""
    run = Interpreter(gm, garbage_collect_values=False)
    run.env = env
    with torch.no_grad(), _Steady():  # type: ignore[no-untyped-call]
        for node in gm.graph.nodes:
            if node in nodes and node not in env:
                try:
                    env[node] = run.run_node(node)
                except _Unsteady:
                    return False
    return True
