"""Do two graphs compute the same? Told by their text, constants included, so that equal ones share a program.

Dynamo makes another graph of the same code for an inference tensor, another thread, a guard that failed for no reason;
sizes that it holds as symbols are numbers again once the graph is captured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.capture import Input


@dataclass(frozen=True)
class Identity:
    """Equal for graphs that compute the same from inputs of the same labels, in whatever order these come.

    `held`: what the digest names by its address; held, so that nothing else gets the address.
    """

    digest: bytes
    held: tuple[Any, ...] = field(compare=False)


def identity(gm: GraphModule, inputs: Sequence[Input], strides: bool = True) -> Identity:
    """Of a graph whose placeholders are `inputs`. Placeholders that nothing uses don't count; `strides`: whether those
    of inputs other than weights do."""
    graph_hash = GraphHash(gm)
    placeholders = fx.placeholders(gm)
    used = [(node, entry) for node, entry in zip(placeholders, inputs, strict=True) if node.users]
    for node, entry in sorted(used, key=lambda pair: pair[1].label):
        kind = _kind(node, strides or entry.is_weight)
        graph_hash.add("input", entry.label, entry.is_weight, kind, name=node)
    graph_hash.add_nodes()
    return Identity(graph_hash.hash.digest(), tuple(graph_hash.referenced))


class GraphHash:
    """The text of a graph, hashed node by node.

    Attributes:
        hash: of what was added so far.
        referenced: what the hash names by its address.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.hash = hashlib.blake2b(digest_size=32)
        self.referenced: list[Any] = []
        self.numbers: dict[Node, int] = {}

    def add(self, *parts: object, name: Node) -> None:
        """Add what the node `name` is; later nodes that read it name it by its number."""
        self.numbers[name] = len(self.numbers)
        self.hash.update(repr(parts).encode())

    def add_nodes(self) -> None:
        """Add all nodes but the placeholders."""
        for node in self.gm.graph.nodes:
            if node.op != "placeholder":
                self._add_node(node)

    def _add_node(self, node: Node) -> None:
        target = self._constant(str(node.target)) if node.op == "get_attr" else self._target(node.target)
        where = [str(module) for module, _ in (node.meta.get("nn_module_stack") or {}).values()]
        sizes = node.meta.get(fx.NOTED_SHAPE)
        self.add(node.op, target, self._value(node.args), self._value(node.kwargs), where, sizes, name=node)

    def _value(self, value: Any) -> str:
        if isinstance(value, Node):
            return f"%{self.numbers[value]}"
        if isinstance(value, (tuple, list)):
            return f"{type(value).__name__}({','.join(map(self._value, value))})"
        if isinstance(value, dict):
            return f"{{{','.join(f'{key!r}:{self._value(item)}' for key, item in value.items())}}}"
        if isinstance(value, slice):
            return f"slice({self._value([value.start, value.stop, value.step])})"
        plain = (str, int, float, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
        return repr(value) if isinstance(value, plain) else self._address(value)

    def _target(self, target: str | Callable[..., Any]) -> str:
        return str(target) if isinstance(target, (str, OpOverload)) else self._address(target)

    def _constant(self, path: str) -> str:
        value: Any = self.gm
        for name in path.split("."):
            value = getattr(value, name)
        if not isinstance(value, torch.Tensor) or type(value) is not torch.Tensor or value.device.type != "cpu":
            return self._address(value)
        raw = value.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        return f"{value.dtype}{tuple(value.shape)}{hashlib.blake2b(raw.numpy().tobytes()).hexdigest()}"

    def _address(self, value: Any) -> str:
        self.referenced.append(value)
        return f"@{type(value).__name__}{id(value)}"


def _kind(node: Node, strides: bool) -> tuple[object, ...]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    at = tuple(map(int, value.stride())) if strides else ()
    return tuple(map(int, value.shape)), at, value.dtype, str(value.device)
