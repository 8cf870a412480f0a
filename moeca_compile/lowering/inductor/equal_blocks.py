"""Which blocks of a graph are equal: runs of nodes that one entry of a module list made (`blocks.3`), by the nodes'
module paths. The path is a label; the evidence is that the runs are the same, node for node."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from moeca_compile.graph import fx

FEWEST = 4  # equal blocks that are worth a body: the first one is often compiled by itself all the same


class Run:
    """Neighbouring nodes of one block. `reads`: what comes from outside, in order of use; `form`: equal for runs that
    differ in nothing else."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.place = {node: i for i, node in enumerate(nodes)}
        sources = (source for node in nodes for source in node.all_input_nodes)
        self.reads = list(dict.fromkeys(source for source in sources if source not in self.place))
        label = {node: f"%{i}" for node, i in self.place.items()} | {
            node: f"in{i}" for i, node in enumerate(self.reads)
        }
        self.form: Hashable = (
            tuple(_call_of(node, label) for node in nodes),
            tuple(map(_kind, self.reads)),
        )

    @property
    def gives(self) -> set[int]:
        """Places of the nodes that are read outside."""
        return {i for i, node in enumerate(self.nodes) if any(user not in self.place for user in node.users)}


def runs(gm: GraphModule) -> list[Run]:
    """Maximal stretches of nodes that one entry of a module list made; a node without a path goes with those before."""
    stretches: list[tuple[str, list[Node]]] = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        block = "" if _changes_inputs(node) else _block(node)
        if stretches and block in (stretches[-1][0], None):
            stretches[-1][1].append(node)
        else:
            stretches.append((block or "", [node]))
    return [Run(nodes) for block, nodes in stretches if block]


def _changes_inputs(node: Node) -> bool:
    """Whether it writes into a state: a body may not, so it stands between the blocks' parts before and after it."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _block(node: Node) -> str | None:
    """`blocks.3` of `blocks.3.attn.qkv`, '' for a path without a number, None where there is no path."""
    path = fx.module_path(node)
    if not path:
        return None
    found = re.match(r".*?\.\d+(?=\.|$)", path)
    return found[0] if found else ""


def _call_of(node: Node, label: Mapping[Node, str]) -> Hashable:
    arguments = map_arg((node.args, tuple(sorted(node.kwargs.items()))), label.__getitem__)
    return str(node.target), repr(arguments), _kind(node)


def _kind(node: Node) -> Hashable:
    def of(value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(map(str, value.shape)), tuple(map(str, value.stride())), str(value.device)
        return tuple(map(of, value)) if isinstance(value, (tuple, list)) else type(value).__name__

    return of(fx.value(node))


def _is_worth_it(run: Run) -> bool:
    heavy = any(node.target in fx.MATMULS or fx.is_experts(node) for node in run.nodes)
    return heavy and not any(fx.has_unknown_size(node) for node in run.nodes)


def equal_blocks(gm: GraphModule) -> list[list[Run]]:
    """The runs of equal blocks that are worth a body, by body."""
    groups: dict[Hashable, list[Run]] = {}
    for run in runs(gm):
        groups.setdefault(run.form, []).append(run)
    return [alike for alike in groups.values() if len(alike) >= FEWEST and _is_worth_it(alike[0])]
