"""Blocks of a Dynamo graph that do the same: runs of nodes that differ only in what they read from outside.

A run is one call of a module, as Dynamo notes it on each node. Two runs have one key if each node of one calls what its
counterpart calls, with equal arguments. The graph alone decides: what the modules are is not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

_SMALLEST = 4  # nodes; for fewer, looking up takes as long as tracing
_VALUES = (bool, int, str, complex, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Block:
    """A run of nodes in one call of a module.

    Attributes:
        key: equal for blocks that do the same.
        nodes: of the run, in order.
        reads: nodes before the run that it reads, in the order of first use.
        gives: positions in the run of the nodes that are read after it.
    """

    key: Hashable
    nodes: Sequence[Node]
    reads: tuple[Node, ...]
    gives: tuple[int, ...]


def repeated_blocks(gm: GraphModule, constants: Mapping[Node, Any]) -> dict[Node, list[Block]]:
    """The blocks that occur more than once, under their first node, the longest first.

    Args:
        gm: Dynamo's graph.
        constants: numbers that stand for nodes, known beforehand (`constants_of`): part of the key.
    """
    nodes = list(gm.graph.nodes)
    blocks = [_block(nodes[start:end], constants) for start, end in _calls(nodes)]
    count = Counter(block.key for block in blocks)
    by_first: dict[Node, list[Block]] = {}
    for block in blocks:
        if count[block.key] > 1:
            by_first.setdefault(block.nodes[0], []).append(block)
    return by_first


def _calls(nodes: Sequence[Node]) -> Iterator[tuple[int, int]]:
    """Start and end of each module's call, an outer one before those in it."""
    stacks = [tuple(node.meta.get("nn_module_stack") or ()) for node in nodes]
    found = []
    opened: list[tuple[Any, int]] = []
    for i, stack in enumerate([*stacks, ()]):
        common = 0
        while common < min(len(stack), len(opened)) and stack[common] == opened[common][0]:
            common += 1
        found += [(start, i) for _, start in opened[common:] if i - start >= _SMALLEST]
        del opened[common:]
        opened += [(call, i) for call in stack[common:]]
    yield from sorted(dict.fromkeys(found), key=lambda span: (span[0], -span[1]))


def _block(nodes: Sequence[Node], constants: Mapping[Node, Any]) -> Block:
    positions = {node: i for i, node in enumerate(nodes)}
    reads: dict[Node, int] = {}

    def refer(node: Node) -> Hashable:
        if node in positions:
            return "inside", positions[node]
        return "outside", reads.setdefault(node, len(reads)), _frozen(constants.get(node), refer)

    parts = tuple(
        (
            node.op,
            node.target if isinstance(node.target, str) else id(node.target),
            _frozen(node.args, refer),
            _frozen(node.kwargs, refer),
            _frozen(constants.get(node), refer),
        )
        for node in nodes
    )
    gives = tuple(i for i, node in enumerate(nodes) if any(user not in positions for user in node.users))
    return Block((parts, gives), nodes, tuple(reads), gives)


def _frozen(value: Any, refer: Callable[[Node], Hashable]) -> Hashable:
    """What is equal for equal arguments alone: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    kind = type(value)
    if isinstance(value, Node):
        return refer(value)
    if isinstance(value, (tuple, list)):
        return kind, *(_frozen(each, refer) for each in value)
    if isinstance(value, dict):
        return kind, *((_frozen(key, refer), _frozen(each, refer)) for key, each in value.items())
    if isinstance(value, slice):
        return kind, *(_frozen(each, refer) for each in (value.start, value.stop, value.step))
    if kind is float:
        return kind, repr(value)
    return (kind, value) if kind in _VALUES else (kind, id(value))
