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
    candidates = []
    for node in gm.graph.nodes:
        if node.target is fx.SDPA:
            query, key, val = (fx.arg(node, i).name for i in range(3))
            candidates.append(AttentionInfo(node.name, query, key, val))
        elif node.target in _PRODUCTS and (written_out := _written_out(node)):
            candidates.append(written_out)
    streams = _Streams(gm, facts)
    classified = []
    for candidate in candidates:
        invariant = is_invariant(candidate, facts.dependence)
        classified.append(replace(candidate, kind=streams.kind(candidate), invariant=invariant))
    return replace(facts, attention=tuple(classified))


def is_invariant(attention: AttentionInfo, depends: Mapping[str, str]) -> bool:
    """Whether keys and values are the same in every step of a trajectory: they depend on the prompt alone."""
    return all(depends.get(name) in ("const", "condition") for name in (attention.key, attention.value))


class _Streams:
    """Which streams queries and keys are projected from."""

    def __init__(self, gm: GraphModule, facts: Facts) -> None:
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.depends = facts.dependence
        self.weights = {entry.name for entry in facts.inputs if entry.is_weight}

    def kind(self, attention: AttentionInfo) -> str:
        query_streams = self._of(self.nodes[attention.query])
        key_streams = self._of(self.nodes[attention.key])
        if not any(a & b for a in query_streams for b in key_streams):
            return "cross"
        return "joint" if len(key_streams) > 1 else "self"

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
        if not self._projects(node):
            return []
        streams: list[Node] = []
        for source in node.all_input_nodes:
            if not self._is_weight(source):
                value = fx.strip(source, fx.is_view)
                streams += value.all_input_nodes if value.target is aten.cat.default else [value]
        return streams

    def _is_weight(self, node: Node) -> bool:
        return fx.strip(node, fx.is_view_or_part).name in self.weights

    def _level(self, node: Node) -> str:
        return self.depends.get(node.name, "latent")


def _makes(node: Node) -> bool:
    """Whether a stream begins here: what a matmul made, or a part of a sequence that is used in parts only."""
    if node.target in fx.PARTS:
        full = fx.strip(node, lambda source: source is node or fx.tensor(source) is None)
        of_tokens = fx.shape(full)[-1:] == fx.shape(node)[-1:] and fx.shape(full) != fx.shape(node)
        return of_tokens and all(user.target in fx.PARTS for user in full.users)
    return node.target in fx.MATMULS or node.target is fx.SDPA or fx.is_experts(node)


def _above(start: Node, stop: Callable[[Node], bool]) -> Iterator[Node]:
    """`start` and what it comes from, not going past nodes where `stop` holds; these are given too."""
    seen, pending = {start}, [start]
    while pending:
        node = pending.pop()
        yield node
        new = [] if stop(node) else [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        pending += new


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
    pending = [node]
    while pending:
        current = pending.pop()
        if isinstance(current, Node):
            if current.target in targets:
                return current
            if current.target in _BETWEEN:
                pending.extend(reversed(current.all_input_nodes))
    return None
