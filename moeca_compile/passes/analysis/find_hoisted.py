"""What doesn't change with the latent, and costs something: it can be computed apart and shared by several calls.

A value is `invariant` where it depends on weights and the condition alone (text keys and values, rotary tables): it is
the same at all steps of a trajectory. It is `step` where the timestep comes in too (adaLN's scales and shifts): it is
the same for all latents. Values stand at the boundary, where something of a higher level reads them, but before views,
parts and sums with a number: these cost nothing, and one tensor serves the six parts of an adaLN.

Left where they are: values without a matmul or a wave behind them (reading them back would cost as much), random and
complex ones, those whose size depends on data, those that the model hands out (the caller may write to them), the
largest values of a step where those of one step take too much memory, and those that ranks exchange: a rank whose
condition changes alone would wait for the others.
Does nothing where every value of any cost follows from the latent.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.regions import HoistedValue
from moeca_compile.passes.analysis.find_inputs import CONDITION, LATENT, LEVELS, STEP
from moeca_compile.passes.facts import Facts

STEP_BYTES = 256 * 2**20
_NAMES = {CONDITION: "invariant", STEP: "step"}
_WAVES = frozenset({aten.sin.default, aten.cos.default, aten.polar.default})
_WITH_NUMBER = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})


def find_hoisted(gm: GraphModule, facts: Facts) -> Facts:
    # constants are hoisted with what depends on the condition
    level = {name: max(LEVELS.index(word), CONDITION) for name, word in facts.dependence.items()}
    costly, bound = set[Node](), set[Node]()
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        same_level = [source for source in inputs if level[source.name] == level[node.name]]
        if node.name in facts.macs or node.target in _WAVES or not costly.isdisjoint(same_level):
            costly.add(node)
        if _is_random(node) or fx.is_collective(node) or not bound.isdisjoint(inputs):
            bound.add(node)

    def at_boundary(node: Node) -> bool:
        users = [user for user in node.users if user.op != "output"]
        return level[node.name] < LATENT and any(level[user.name] > level[node.name] for user in users)

    sources = {_source(node, level): None for node in gm.graph.nodes if at_boundary(node)}
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    values = [
        HoistedValue(node.name, _NAMES[level[node.name]], _bytes(node))
        for node in sorted(sources, key=place.__getitem__)
        if node in costly and node not in bound and _can_wait(node)
    ]
    return replace(facts, hoisted=_within_limit(values))


def _within_limit(values: list[HoistedValue]) -> tuple[HoistedValue, ...]:
    """Without the largest values of a step, if those of one step together take more than `STEP_BYTES`. Hoisted values
    of all layers are in memory at once; with a timestep for each token they are as large as the layers' activations."""
    total = sum(value.bytes for value in values if value.level == "step")
    left_out = set[HoistedValue]()
    for value in sorted(values, key=lambda value: -value.bytes):
        if total <= STEP_BYTES:
            break
        if value.level == "step":
            left_out.add(value)
            total -= value.bytes
    return tuple(value for value in values if value not in left_out)


def _source(node: Node, level: dict[str, int]) -> Node:
    """The tensor that `node` is a view or part of, at its own level."""
    best = node
    while node.op == "call_function" and (fx.is_view_or_part(node) or _adds_number(node)):
        above = fx.arg(node, 0)
        if level[above.name] != level[node.name]:
            break
        node = above
        best = node if fx.tensor(node) is not None else best
    return best


def _adds_number(node: Node) -> bool:
    return node.target in _WITH_NUMBER and isinstance(node.args[0], Node) and not isinstance(node.args[1], Node)


def _can_wait(node: Node) -> bool:
    val = fx.tensor(node)
    return val is not None and not val.is_complex() and not fx.has_unknown_size(node) and not _is_handed_out(node)


def _is_handed_out(node: Node) -> bool:
    """Whether the model's outputs share memory with it."""
    return any(user.op == "output" or (fx.is_view_or_part(user) and _is_handed_out(user)) for user in node.users)


def _is_random(node: Node) -> bool:
    """Whether two calls may differ. SDPA is tagged for its dropout, which inference hasn't."""
    target = node.target
    return isinstance(target, OpOverload) and target is not fx.SDPA and torch.Tag.nondeterministic_seeded in target.tags


def _bytes(node: Node) -> int:
    val = fx.tensor(node)
    return val.numel() * val.element_size() if val is not None else 0
