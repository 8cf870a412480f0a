"""Where a graph may turn channels in pairs: sums of products that have one factor in common, however it is moved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.onnx.rotary.elements import Elements, is_move, operands
from moeca_compile.lowering.onnx.rotary.proof import EMPTY, SUMS, Proof, Rotation, factor_of

_ROOTS = SUMS | {aten.stack.default, aten.cat.default, aten.slice_scatter.default, aten.view_as_real.default}
_THROUGH = SUMS | {aten.view_as_real.default, aten.view_as_complex.default}
_MOST = 4  # products of a rotation


class Rotations:
    """The rotations of a graph.

    Args:
        elements: the labels of its values.
    """

    def __init__(self, elements: Elements) -> None:
        self._elements = elements
        self._known: dict[str, Rotation | None] = {}  # by how they are written; blocks are alike

    def at(self, root: Node) -> Rotation | None:
        """What a node computes, if that is a rotation by proof, in float32."""
        val = fx.tensor(root)
        if root.target not in _ROOTS or val is None or val.dtype != torch.float32 or not fx.shape(root):
            return None
        muls = _products(root)
        if muls is None:
            return None
        sides = [(_moved_from(fx.arg(mul, 0)), _moved_from(fx.arg(mul, 1))) for mul in muls]
        for x in sorted(set[Node].intersection(*(left | right for left, right in sides)), reverse=True):
            if _may_be_turned(x, root):
                tables = {mul: fx.arg(mul, int(x in left)) for mul, (left, _) in zip(muls, sides, strict=True)}
                written = self._written(root, x, tables)
                if written not in self._known:
                    self._known[written] = Proof(root, x, tables, self._elements).rotation()
                rotation = self._known[written]
                if rotation is not None:
                    return replace(rotation, x=x)
        return None

    def _written(self, root: Node, x: Node, tables: Mapping[Node, Node]) -> str:
        """How a node is computed from x: all that a proof looks at."""
        names, lines = {x: "x"}, [f"x {fx.shape(x)}"]

        def name(node: Node) -> str:
            if node not in names:
                names[node], arguments = f"%{len(names)}", "from elsewhere"
                if node in tables:
                    labels = self._elements.real(tables[node])
                    digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
                    arguments = f"{name(factor_of(node, tables[node]))} {tuple(labels.shape)} {digest}"
                elif is_move(node) or node.target in _THROUGH:
                    arguments = str(map_arg((node.args, node.kwargs), name))
                lines.append(f"{names[node]} {node.target} {fx.shape(node)} {arguments}")
            return names[node]

        name(root)
        return "\n".join(lines)


def _products(root: Node) -> list[Node] | None:
    """The products that a node consists of, if nobody else reads them or their sums."""
    muls, inside, waiting = list[Node](), {root}, [root]
    while waiting:
        node = waiting.pop()
        sources = operands(node)
        if node.target is aten.mul.Tensor and len(sources) == 2 and _is_float32(node):
            muls.append(node)
            continue
        if node.target in EMPTY:
            continue
        is_sum = node.target in SUMS and len(sources) == 2 and not node.kwargs
        is_real = node.target is aten.view_as_real.default and sources[0].target is aten.mul.Tensor
        if len(muls) > _MOST or not (is_sum or is_real or is_move(node)):
            return None
        waiting += [one for one in sources if one not in inside]
        inside.update(sources)
    computed = [node for node in inside if node is not root and (node.target in SUMS or node in muls)]
    return muls if muls and all(inside >= set(node.users) for node in computed) else None


def _moved_from(node: Node) -> set[Node]:
    """A factor, and what its elements are moved from."""
    found, waiting = {node}, [node]
    while waiting:
        one = waiting.pop()
        if is_move(one) or one.target is aten.view_as_complex.default:
            waiting += [source for source in operands(one) if source not in found]
            found.update(operands(one))
    return found


def _is_float32(product: Node) -> bool:
    val = fx.tensor(product)
    return val is not None and val.dtype in (torch.float32, torch.complex64)


def _may_be_turned(x: Node, root: Node) -> bool:
    val, result = fx.tensor(x), fx.need(root)
    return (
        val is not None
        and val.numel() == result.numel()
        and torch.promote_types(val.dtype, result.dtype) == result.dtype
    )
