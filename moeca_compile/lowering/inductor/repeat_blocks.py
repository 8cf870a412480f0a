"""Equal blocks -> one body and a call for each: Inductor compiles one block, however many there are.

Before: a variant's graph.  After: runs of nodes that differ only in what they read are calls of one subgraph
(`invoke_subgraph`, which Inductor compiles once). Which they are says `equal_blocks`.

Runs without a matmul stay as they are: a stretch of reused blocks is one kernel that reads each state once, and the
borders of calls would make it write the stream in between.
Does nothing where fewer than four blocks are equal, or where no equal block has a matmul.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch.fx import Graph, GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.equal_blocks import Run, equal_blocks

_BODY = "body_"


def repeat_blocks(gm: GraphModule, variant: Variant) -> GraphModule:
    moved: dict[Node, Node] = {}  # what blocks gave, to what their calls give
    for number, alike in enumerate(equal_blocks(gm)):
        gives = sorted(set.union(*(run.gives for run in alike)))
        if _may_leave(alike[0], gives):
            name = f"{_BODY}{number}"
            gm.add_module(name, _body(alike[0], gives))
            for run in alike:
                _call(gm, run, gives, name, moved)
    if moved:
        gm.graph.eliminate_dead_code(fx.has_effect)
    return gm


def has_bodies(gm: GraphModule) -> bool:
    """Whether `repeat_blocks` made one in it."""
    return any(name.startswith(_BODY) for name, _ in gm.named_children())


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
