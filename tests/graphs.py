"""A pass test is (graph, pass, expected graph), each graph written as the torch code that it is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from moeca_compile.passes.manager import Pass, PassManager

C = TypeVar("C")
Code = Callable[..., Any]


def graph_of(code: Code, *args: Tensor) -> GraphModule:
    """The ATen graph of plain code, which gives a tuple as a captured one does."""

    def tupled(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = code(*tensors)
        return result if isinstance(result, tuple) else (result,)

    with torch.no_grad():
        gm = make_fx(tupled, tracing_mode="fake", pre_dispatch=True)(*args)
    assert isinstance(gm, GraphModule)
    return gm


def applied(one: Pass[C], gm: GraphModule, context: C) -> tuple[GraphModule, bool]:
    """What the pass makes of a copy, checked by the pass manager, and whether it changed anything."""
    manager = PassManager(verify=True)
    return manager.rewrite((one,), gm, context), manager.records[-1].modified


def assert_becomes(one: Pass[C], context: C, before: Code, after: Code, *args: Tensor) -> None:
    """The pass turns the graph of `before` into that of `after`, with the same results bit for bit."""
    gm = graph_of(before, *args)
    found, modified = applied(one, gm, context)
    assert text_of(found) == text_of(graph_of(after, *args))
    assert modified is (text_of(gm) != text_of(found))
    with torch.no_grad():
        for left, right in zip(found(*args), gm(*args), strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


def assert_unchanged(one: Pass[C], gm: GraphModule, context: C) -> None:
    """The pass leaves the graph as it is, and says so."""
    found, modified = applied(one, gm, context)
    assert text_of(found) == text_of(gm)
    assert not modified


def text_of(gm: GraphModule) -> list[str]:
    """One line a node, whatever the nodes are called."""
    place = {node: f"%{i}" for i, node in enumerate(gm.graph.nodes)}
    lines = []
    for node in gm.graph.nodes:
        args = map_arg((node.args, node.kwargs), lambda one: place[one])
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        lines.append(f"{place[node]} {node.op} {target} {args}")
    return lines
