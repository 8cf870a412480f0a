"""Equal blocks -> one body and a call for each: Inductor compiles one block, however many there are.

Before: a variant's graph.  After: runs of nodes that differ only in what they read are calls of one subgraph
(`invoke_subgraph`, which Inductor compiles once). A run is what one entry of a module list made (`blocks.3`), by the
nodes' module paths; that is a label, the evidence is that the runs are the same, node for node.

Runs without a matmul stay as they are: a stretch of reused blocks is one kernel that reads each state once, and the
borders of calls would make it write the stream in between.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moeca_compile.graph import fx
from moeca_compile.lowering.inductor.straight_stream import straighten

_BODY = "body_"
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


def repeat_blocks(gm: GraphModule) -> GraphModule:
    """A graph that computes the same; the given one itself where no two blocks are equal."""
    found = _runs(gm)
    if not _repeated(found):
        return gm
    if straighten(gm, {source for run in found for source in run.reads}):
        found = _runs(gm)
    moved: dict[Node, Node] = {}  # what blocks gave, to what their calls give
    for number, runs in enumerate(_repeated(found)):
        gives = sorted(set.union(*(run.gives for run in runs)))
        if _may_leave(runs[0], gives):
            name = f"{_BODY}{number}"
            gm.add_module(name, _body(runs[0], gives))
            for run in runs:
                _call(gm, run, gives, name, moved)
    gm.graph.eliminate_dead_code(fx.has_effect)
    gm.graph.lint()
    gm.recompile()
    return gm


def _repeated(found: Sequence[Run]) -> list[list[Run]]:
    """The runs of equal blocks that get a body, by body."""
    groups: dict[Hashable, list[Run]] = {}
    for run in found:
        groups.setdefault(run.form, []).append(run)
    return [runs for runs in groups.values() if len(runs) >= FEWEST and _is_worth_it(runs[0])]


def has_bodies(gm: GraphModule) -> bool:
    """Whether `repeat_blocks` made one in it."""
    return any(name.startswith(_BODY) for name, _ in gm.named_children())


def _runs(gm: GraphModule) -> list[Run]:
    """Maximal stretches of nodes that one entry of a module list made; a node without a path goes with those before."""
    stretches: list[tuple[str, list[Node]]] = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        block = _block(node)
        if stretches and block in (stretches[-1][0], None):
            stretches[-1][1].append(node)
        else:
            stretches.append((block or "", [node]))
    return [Run(nodes) for block, nodes in stretches if block]


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


def _may_leave(run: Run, gives: Sequence[int]) -> bool:
    """Whether these results are tensors of the body's own: none may share memory with what it reads or with another."""
    bases = [fx.strip(run.nodes[i], fx.is_view_or_part) for i in gives]
    own = all(base in run.place and fx.tensor(run.nodes[i]) is not None for base, i in zip(bases, gives, strict=True))
    return own and len(set(bases)) == len(bases)


def _body(run: Run, gives: Sequence[int]) -> GraphModule:
    graph, copies = Graph(), dict[Node, Node]()
    for i, source in enumerate(run.reads):
        copies[source] = graph.placeholder(f"in{i}")
        copies[source].meta["val"] = fx.value(source)
    for node in run.nodes:
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[run.nodes[i]] for i in gives))
    return GraphModule({}, graph)


def _call(gm: GraphModule, run: Run, gives: Sequence[int], name: str, moved: dict[Node, Node]) -> None:
    from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

    with gm.graph.inserting_after(run.nodes[-1]):
        body = gm.graph.get_attr(name)
    with gm.graph.inserting_after(body):
        results = gm.graph.call_function(
            invoke_subgraph, (body, name, *(moved.get(source, source) for source in run.reads))
        )
    results.meta["val"] = tuple(fx.value(run.nodes[i]) for i in gives)
    last = results
    for number, i in enumerate(gives):
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(operator.getitem, (results, number))
        last.meta.update(run.nodes[i].meta)
        run.nodes[i].replace_all_uses_with(last, delete_user_cb=lambda user: user not in run.place)
        moved[run.nodes[i]] = last
