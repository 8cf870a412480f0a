"""Multiply-accumulates of every node, from shapes alone. Elementwise work counts nothing.

Does nothing where there is no matmul.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

import moeca_compile.ops.experts  # noqa: F401  (defines moeca::experts)
from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.ops.branches import BRANCHES
from moeca_compile.passes.facts import Facts

_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip
_EXPERTS = torch.ops.moeca.experts.default
_COUNTED = frozenset({*fx.MATMULS, fx.SDPA, *_CONVOLUTIONS, _EXPERTS, BRANCHES})


def count_macs(gm: GraphModule, facts: Facts) -> Facts:
    return replace(facts, macs={node.name: macs for node in gm.graph.nodes if (macs := node_macs(node))})


def node_macs(node: Node) -> int:
    """MACs of one call of `node`."""
    if node.target not in _COUNTED:
        return 0
    if node.target is _EXPERTS:
        return math.prod(fx.shape(fx.arg(node, 1))) * _one_expert(node.args[2:5])
    if node.target is BRANCHES:
        arguments = fx.arguments_of(node)
        weights = [arguments[name] for name in ("up", "down", "gate")]
        return fx.shape(arguments["ids"])[0] * int(arguments["count"]) * _one_expert(weights)
    inputs = [fx.shape(source) for source in fx.nodes_of(node.args)]  # a tensor may be given twice
    out = math.prod(fx.shape(node))
    if node.target in (aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default):
        return out * inputs[0][-1]
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        return out * inputs[1][-1]
    if node.target is fx.SDPA:
        query, key, val = (fx.shape(fx.arg(node, i)) for i in range(3))
        return math.prod(query[:-1]) * key[-2] * (query[-1] + val[-1])
    if node.target in _CONVOLUTIONS:
        return out * math.prod(fx.shape(fx.arg(node, 1))[1:])
    if node.target is aten.einsum.default:
        return _einsum(str(node.args[0]), inputs)
    if node.target is aten._grouped_mm.default:
        return out * inputs[0][-1]
    return 0


def _one_expert(groups: Iterable[Any]) -> int:
    """MACs of an expert for a row: of its up, down and gate, the weights of all experts in each."""
    weights = [list(fx.nodes_of(group)) for group in groups]
    return sum(math.prod(fx.shape(group[0])) for group in weights if group)


def _einsum(equation: str, inputs: list[tuple[int, ...]]) -> int:
    """The product of all index extents: what one contraction of all operands together costs."""
    extents: dict[str, int] = {}
    for letters, shape in zip(equation.replace(" ", "").split("->")[0].split(","), inputs, strict=False):
        if len(letters) == len(shape):
            extents.update(zip(letters, shape, strict=True))
    return math.prod(extents.values()) if len(inputs) > 1 else 0
