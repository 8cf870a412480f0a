"""Routers: a choice of the largest of some scores that a projection made, and what it steers.

Before: who depends on what.  After: one `RouterInfo` for each choice, whatever form its experts have. Who chooses is
read off the axes: the one that the projection's outputs lie along is the experts' (or heads'). A top-k along it is
token choice, along another one expert choice. A top-k that only prepares another one (groups) isn't a router.
Does nothing where no choice steers anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.regions import RouterInfo
from moeca_compile.passes.facts import Facts

_CHOICES = {aten.topk.default, aten.max.dim, aten.argmax.default}
_FIRST = {aten.max.dim, aten.argmax.default}  # the largest one: top-1
# what scores go through between the projection and the choice; the first argument carries the scores
_SCORING = fx.VIEWS | {
    aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor,
    aten.div.Tensor, aten.pow.Tensor_Scalar, aten.sqrt.default, aten.softplus.default, aten.masked_fill.Scalar,
    aten.masked_fill.Tensor, aten.where.self, aten.select.int, aten.clamp.default, aten.tanh.default,
}  # fmt: skip
# where the first argument's values end: a residual sum, or a new tensor of the same shape
_OTHER_VALUES = {
    aten.add.Tensor, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
}  # fmt: skip


def find_routers(gm: GraphModule, facts: Facts) -> Facts:
    depends = facts.dependence
    routers: dict[tuple[str, str], RouterInfo] = {}
    for node in gm.graph.nodes:
        if node.target not in _CHOICES or (node.target is aten.max.dim and not _reads_index(node)):
            continue
        path = _to_projection(node, depends)
        steers = None if path is None else _steered(node, path[0])
        if path is None or not steers:
            continue
        info = _info(node, path, depends, steers, {attention.node for attention in facts.attention})
        earlier = routers.get((path[0].name, info.choice))
        if earlier is not None:  # one top-k for each expert, over the same scores
            new = [name for name in info.steers if name not in earlier.steers]
            info = replace(earlier, steers=(*earlier.steers, *new))
        routers[path[0].name, info.choice] = info
    return replace(facts, routers=tuple(routers.values()))


def _reads_index(node: Node) -> bool:
    return any(user.args[1] == 1 for user in node.users if len(user.args) > 1)


def _to_projection(choice: Node, depends: Mapping[str, str]) -> list[Node] | None:
    """From the projection down to the scores that are chosen from; None where something else made them."""
    path = [fx.arg(choice, 0)]
    while path[-1].target not in fx.MATMULS:
        node = path[-1]
        if node.target not in _SCORING or not node.args:
            return None
        if node.target in (aten.add.Tensor, aten.sub.Tensor):
            others = [source for source in node.all_input_nodes if source is not node.args[0]]
            if any(depends.get(source.name) == "latent" for source in others):
                return None  # a residual add
        first = node.args[1] if node.target is aten.where.self else node.args[0]
        if not isinstance(first, Node):
            return None
        path.append(first)
    return path[::-1]


def _steered(choice: Node, projection: Node) -> list[Node]:
    """The matmuls that act on the choice and what combines their results by it; none where another choice follows."""
    light, pending, steered = {choice}, [choice], dict[Node, None]()
    while pending:
        for user in pending.pop().users:
            if user in light or user.op == "output":
                continue
            if user.target is aten.topk.default:
                return []
            heavy = user.target in fx.MATMULS or fx.is_experts(user)
            beside = [part for other in user.all_input_nodes if other not in light for part in _parts(other, user)]
            combines = any(_heavy(value) not in (None, projection) for value in beside)
            if heavy or (combines and not _of_gates(user, beside)):
                steered[user] = None
            else:
                light.add(user)
                pending.append(user)
    return list(steered)


def _parts(value: Node, user: Node) -> list[Node]:
    """`value`; where the choice selects between sums, what is summed: experts may add their input."""
    total = fx.strip(value, fx.is_view)
    summed = user.target is aten.where.self and total.target is aten.add.Tensor
    return list(total.all_input_nodes) if summed else [value]


def _of_gates(node: Node, beside: Sequence[Node]) -> bool:
    """Whether gates only meet other gates here: they are concatenated, or scaled by what holds fewer values."""
    smaller = all(math.prod(fx.shape(source)) < math.prod(fx.shape(node)) for source in beside)
    scaled = any(fx.shape(source) == fx.shape(node) for source in node.all_input_nodes if source not in beside)
    return node.target is aten.cat.default or (node.target is aten.mul.Tensor and smaller and scaled)


def _heavy(node: Node) -> Node | None:
    """The matmul or attention whose result `node` is, through activations and views only."""
    while node.target not in fx.MATMULS and node.target is not fx.SDPA and not fx.is_experts(node):
        if node.target in _OTHER_VALUES or not node.args or not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    return node


def _info(
    choice: Node, path: list[Node], depends: Mapping[str, str], steers: list[Node], attention: set[str]
) -> RouterInfo:
    scores = path[-1]
    rank = len(fx.shape(scores))
    axes = _expert_axes(path)
    first = choice.target in _FIRST
    count: Any = 1 if first else choice.args[1]
    dims: Any = choice.args[1 if first else 2 :]
    along = (dims[0] if dims else -1) % max(rank, 1)
    if not isinstance(count, int):
        kind, count = "batch", 0
    elif any(_gates_heads(node, attention) for node in steers):
        kind = "head"
    elif depends.get(choice.name, "latent") != "latent":
        kind = "step"
    elif along in axes:
        kind = "token"
    else:  # along the tokens: of one sample, or of the whole batch where nothing but them is left
        kind = "expert" if rank > 2 else "batch"
    num_experts = math.prod(fx.shape(scores)[axis] for axis in axes) if axes else fx.shape(path[0])[-1]
    return RouterInfo(choice.name, scores.name, num_experts, count, kind, tuple(node.name for node in steers))


def _gates_heads(node: Node, attention: set[str]) -> bool:
    """Whether an attention's result is combined with the choice before anything else is done with it."""
    sources = (_heavy(operand) for operand in node.all_input_nodes)
    return any(source is not None and source.name in attention for source in sources)


def _expert_axes(path: list[Node]) -> tuple[int, ...]:
    """Where the projection's outputs lie in the scores; () where one of them was picked out."""
    axes: tuple[int, ...] = (len(fx.shape(path[0])) - 1,)
    for before, node in itertools.pairwise(path):
        axes = _moved(axes, before, node) if axes else ()
    return axes


def _moved(axes: tuple[int, ...], before: Node, node: Node) -> tuple[int, ...]:
    """The axes of `node` that are `axes`, neighbours, of the value it was made of; () where they are lost."""
    old, new = fx.shape(before), fx.shape(node)
    args: Any = node.args
    order = list(range(len(old)))
    if node.target is aten.permute.default:
        order = [axis % len(old) for axis in args[1]]
    elif node.target is aten.transpose.int or node.target is aten.t.default:
        a, b = (axis % len(old) for axis in args[1:3]) if len(args) > 1 else (0, 1)
        order[a], order[b] = b, a
    elif node.target is aten.select.int:
        dropped = args[1] % len(old)
        return () if dropped in axes else tuple(axis - (dropped < axis) for axis in axes)
    elif old != new:
        return _same_place(axes, old, new)
    return tuple(sorted(order.index(axis) for axis in axes))


def _same_place(axes: tuple[int, ...], old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    """After a reshape: the neighbouring axes that hold as much, with as much behind them."""
    size, behind = math.prod(old[axis] for axis in axes), math.prod(old[axes[-1] + 1 :])
    for start, end in itertools.combinations(range(len(new) + 1), 2):
        if math.prod(new[start:end]) == size and math.prod(new[end:]) == behind:
            return tuple(range(start, end))
    return ()
