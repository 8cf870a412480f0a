"""Attention anchors: a scaled-dot-product call, or softmax(Q K^T) V written out.

Before: functional ATen with SDPA whole, what depends on what.  After: one `AttentionInfo` each, which says where its
keys come from (the stream of the queries, another one, or several joined) and whether they change in a trajectory.
A stream is what flows along one residual: what a projection reads and its trunk have in common.
Does nothing where no attention is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.regions import AttentionInfo
from moeca_compile.passes.facts import Facts

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
# what may stand between QK^T and its softmax, and between the softmax and V: scale, mask, bias, casts, a sink (a column
# of scores beside the keys', dropped behind the softmax)
_BETWEEN = fx.VIEWS | {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.masked_fill.Scalar,
    aten.masked_fill.Tensor, aten.where.self, aten.dropout.default, aten.tanh.default, aten.clamp.default,
    aten.cat.default, aten.constant_pad_nd.default, aten.pad.default, aten.slice.Tensor, aten.narrow.default,
}  # fmt: skip


def find_attention(gm: GraphModule, facts: Facts) -> Facts:
    found = []
    for node in gm.graph.nodes:
        if node.target is fx.SDPA:
            query, key, val = (fx.arg(node, i).name for i in range(3))
            found.append(AttentionInfo(node.name, query, key, val))
        elif node.target in _PRODUCTS and (written_out := _written_out(node)):
            found.append(written_out)
    streams = _Streams(gm, facts)
    depends = facts.dependence
    told = [replace(one, kind=streams.kind(one), invariant=is_invariant(one, depends)) for one in found]
    return replace(facts, attention=tuple(told))


def is_invariant(attention: AttentionInfo, depends: Mapping[str, str]) -> bool:
    """Whether keys and values are the same in every step of a trajectory: they depend on the prompt alone."""
    return all(depends.get(name) in ("const", "condition") for name in (attention.key, attention.value))


class _Streams:
    """Which streams queries and keys are projected from."""

    def __init__(self, gm: GraphModule, facts: Facts) -> None:
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.depends = facts.dependence
        self.weights = {one.name for one in facts.inputs if one.is_weight}

    def kind(self, attention: AttentionInfo) -> str:
        asking, asked = (self._of(self.nodes[name]) for name in (attention.query, attention.key))
        if not any(a & b for a in asking for b in asked):
            return "cross"
        return "joint" if len(asked) > 1 else "self"

    def _of(self, start: Node) -> list[set[Node]]:
        """The streams behind queries or keys, each as the values met on its way up to the matmuls that made them.

        Two projections of one stream, however it was shifted or scaled before each, have such values in common."""
        sources = [part for node in _above(start, self._projects) for part in self._projected(node)] or [start]
        width = max(len(fx.shape(node)) for node in sources)  # per token, unlike a modulation by the timestep
        streams: list[set[Node]] = []
        for source in sources:
            level = self._level(source)
            met = {node for node in _above(source, _makes) if node is source or not _makes(node)}
            met = {node for node in met if self._level(node) == level}
            if level != "const" and len(fx.shape(source)) == width and not any(met & other for other in streams):
                streams.append(met)
        return streams

    def _projects(self, node: Node) -> bool:
        return node.target in fx.MATMULS and any(map(self._is_weight, node.all_input_nodes))

    def _projected(self, node: Node) -> list[Node]:
        """What a projection reads; for several streams joined end to end, each of them."""
        inputs = [one for one in node.all_input_nodes if not self._is_weight(one)] if self._projects(node) else []
        joined = [fx.strip(one, fx.is_view) for one in inputs]
        parts = [list(one.all_input_nodes) if one.target is aten.cat.default else [one] for one in joined]
        return [part for some in parts for part in some]

    def _is_weight(self, node: Node) -> bool:
        return fx.strip(node, fx.is_view_or_part).name in self.weights

    def _level(self, node: Node) -> str:
        return self.depends.get(node.name, "latent")


def _makes(node: Node) -> bool:
    """Whether a stream begins here: what a matmul made, or a part of a sequence that is used in parts only."""
    if node.target in fx.PARTS:
        whole = fx.strip(node, lambda one: one is node or fx.tensor(one) is None)
        of_tokens = fx.shape(whole)[-1:] == fx.shape(node)[-1:] and fx.shape(whole) != fx.shape(node)
        return of_tokens and all(user.target in fx.PARTS for user in whole.users)
    return node.target in fx.MATMULS or node.target is fx.SDPA or fx.is_experts(node)


def _above(start: Node, stop: Callable[[Node], bool]) -> Iterator[Node]:
    """`start` and what it comes from, not going past nodes where `stop` holds; these are given too."""
    seen, front = {start}, [start]
    while front:
        node = front.pop()
        yield node
        new = [] if stop(node) else [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        front += new


def _written_out(product: Node) -> AttentionInfo | None:
    operands = list(fx.nodes_of(product.args))
    if len(operands) < 2:
        return None
    weights, val = operands[-2:]
    softmax = _climb(weights, _SOFTMAX)
    scores = _climb(softmax.args[0], _PRODUCTS) if softmax is not None else None
    if softmax is None or scores is None:
        return None
    query, key = list(fx.nodes_of(scores.args))[-2:]
    return AttentionInfo(product.name, query.name, key.name, val.name)


def _climb(node: object, targets: tuple[object, ...]) -> Node | None:
    """The nearest ancestor with one of `targets`, through scaling, masking and views only."""
    front = [node]
    while front:
        here = front.pop()
        if isinstance(here, Node):
            if here.target in targets:
                return here
            if here.target in _BETWEEN:
                front.extend(reversed(here.all_input_nodes))
    return None
