"""A graph as its form and its numbers: graphs of one form are the same but for whole numbers, such as sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.same_graph import GraphHash


@dataclass(frozen=True)
class Form:
    """Of a graph with its arguments.

    Attributes:
        digest: equal for graphs that differ in whole numbers alone.
        numbers: sizes and strides of each tensor among the arguments, in order, then the whole numbers in the nodes.
        held: what the digest names by its address; held, so that nothing else gets the address.
    """

    digest: bytes
    numbers: tuple[int, ...]
    held: tuple[Any, ...] = field(compare=False)


def form_of(gm: GraphModule, args: Sequence[Any]) -> Form:
    """The form of a graph that is called with tensors like `args`; a fake tensor stands for a plain one."""
    graph_hash = _FormHash(gm)
    for node, arg in zip(fx.placeholders(gm), args, strict=True):
        if isinstance(arg, torch.Tensor):
            graph_hash.collected += [*arg.shape, *arg.stride()]
            kind = torch.Tensor if isinstance(arg, FakeTensor) else type(arg)
            graph_hash.add("input", kind, arg.dtype, str(arg.device), arg.dim(), name=node)
        else:
            graph_hash.add("input", arg, name=node)
    graph_hash.add_nodes()
    return Form(graph_hash.hash.digest(), tuple(graph_hash.collected), tuple(graph_hash.referenced))


class _FormHash(GraphHash):
    """Collects whole numbers instead of hashing them; a body that several nodes call is looked through once."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.collected: list[int] = []
        self._bodies: dict[GraphModule, str] = {}

    def _value(self, value: Any) -> str:
        if type(value) is int:
            self.collected.append(value)
            return "#"
        return super()._value(value)

    def _constant(self, path: str) -> str:
        value = getattr(self.gm, path, None)
        if not isinstance(value, GraphModule):
            return super()._constant(path)
        if value not in self._bodies:
            self._bodies[value] = f"body {len(self._bodies)}"
            inside = _FormHash(value)
            for node in fx.placeholders(value):
                inside.add("input", name=node)
            inside.add_nodes()
            self.collected += inside.collected
            self.referenced += inside.referenced
            self.hash.update(inside.hash.digest())
        return self._bodies[value]
