"""Which regions can be recomputed in part, and how; or why not.

Before: the regions.  After: each has its `division`, which says how or why not. An attention or an mlp is taken apart
by its tokens: everything between what enters it and its output must treat each token for itself, but for the attention
proper. An experts region is taken apart by branches: the router stays, the branches are kept one by one, what lies
beside them (shared experts) token by token.
Does nothing where there are no regions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch.fx import GraphModule, Node

from moeca_compile.dtypes import name_of
from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.regions import BranchesInfo, Divisible, Indivisible, Region, Value
from moeca_compile.passes.facts import Facts
from moeca_compile.passes.partial.token_axes import MixesTokens, TokenAxes


def find_divisions(gm: GraphModule, facts: Facts) -> Facts:
    finder = _Finder(gm, facts)
    regions = tuple(replace(region, division=finder.division(region)) for region in facts.regions)
    return replace(facts, regions=replace(facts.regions, regions=regions))


class _Finder:
    def __init__(self, gm: GraphModule, facts: Facts) -> None:
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.cone = fx.Cone(gm)
        self.latent = {name for name, level in facts.dependence.items() if level == "latent"}
        self.macs = facts.macs

    def division(self, region: Region) -> Divisible | Indivisible:
        try:
            return self._divisible(region)
        except MixesTokens as reason:
            return Indivisible(str(reason))

    def _divisible(self, region: Region) -> Divisible:
        shape = region.shapes[0]
        if region.kind == "span":
            raise MixesTokens("a span of blocks is cached as a whole")
        if len(region.outputs) != 1:
            raise MixesTokens("it serves several streams at once")
        if len(shape) != 3 or shape[1] < 2:
            raise MixesTokens(f"its output {list(shape)} isn't a sequence of tokens [B, N, D]")
        body = [self.nodes[name] for name in region.body]
        if region.kind == "experts":
            return self._branches(region, body, shape[0], shape[1])
        output = self.nodes[region.outputs[0]]
        axes, streams = self._axes(body, output, shape[0], shape[1])
        if len(region.attention) > 1:
            raise MixesTokens("it has several attentions")
        keys: tuple[str, ...] = ()
        for attention in region.attention:
            if self.nodes[attention.node].target is not fx.SDPA:
                raise MixesTokens(f"{attention.node}: the attention is written out, not one operator")
            keys = tuple(name for name in (attention.key, attention.value) if self.nodes[name] in axes.of)
        return Divisible(
            *shape[:2],
            parts=(_value(output),),
            body=region.body,
            axes=_plain(axes),
            enters=_value(streams[0], *shape[:2]),
            keys=tuple(_value(self.nodes[name]) for name in dict.fromkeys(keys)),
        )

    def _axes(self, body: Sequence[Node], output: Node, batch: int, tokens: int) -> tuple[TokenAxes, list[Node]]:
        """Axes of `body`, from the streams that enter it to `output`; and these streams."""
        axes, inside = TokenAxes(batch, tokens), set(body)
        entering = dict.fromkeys(source for node in body for source in node.all_input_nodes if source not in inside)
        for node in entering:
            if node.name in self.latent and not axes.seed(node):
                raise MixesTokens(f"{node.name} {list(fx.shape(node))} enters it and isn't [B, N, ...]")
        axes.follow(body)
        axis = axes.of.get(output)
        if axis is None or axis.merged is (len(fx.shape(output)) > 2) or axis.dim != 1 - axis.merged:
            raise MixesTokens(f"{output.name}: its output isn't [B, N, ...]")
        return axes, [node for node in entering if node.name in self.latent]

    def _branches(self, region: Region, body: list[Node], batch: int, tokens: int) -> Divisible:
        if len(region.experts) != 1 or len(region.routers) != 1:
            raise MixesTokens("its experts aren't one moeca::experts call with one router")
        router, experts = region.routers[0], self.nodes[region.experts[0].node]
        if router.choice != "token":
            raise MixesTokens(f"the {router.choice} chooses in its router: a token has no fixed number of branches")
        rows, top_k, _ = fx.shape(experts)
        if rows != batch * tokens:
            raise MixesTokens(f"{rows} tokens are routed, its output has {batch * tokens}")
        gates, total = _gates(experts)
        if math.prod(fx.shape(gates)) != rows * top_k:
            raise MixesTokens(f"{gates.name}: not one gate weight a branch")
        axes = TokenAxes(batch, tokens)
        parts = self._beside(body, experts, gates)
        recomputed: set[Node] = set()
        for part in parts:
            nodes = self._only_for(part, body, experts, gates)
            recomputed.update(nodes)
            axes.of.update(self._axes(nodes, part, batch, tokens)[0].of)
        return Divisible(
            batch,
            tokens,
            parts=tuple(_value(part, batch, tokens) for part in parts),
            body=tuple(node.name for node in body if node in recomputed),
            axes=_plain(axes),
            branches=BranchesInfo(
                _value(experts, batch, tokens), gates.name, router.scores, router.num_experts, total.name
            ),
        )

    def _beside(self, body: list[Node], experts: Node, gates: Node) -> list[Node]:
        """The heavy values that join the routed branches below the experts: shared experts."""
        inside = set(body)
        below = {node for node in body if self.cone.feeds(experts, node)}
        routed = {experts, gates}
        joined: dict[Node, None] = {}
        for node in body:
            for source in node.all_input_nodes if node in below else ():
                is_beside = source in inside and source not in below and source not in routed
                if is_beside and not self.cone.feeds(source, experts):
                    joined[source] = None
        heavy = []
        for part in joined:
            if not any(node.name in self.macs for node in self._only_for(part, body, experts, gates)):
                continue
            if len(fx.shape(part)) not in (2, 3):
                raise MixesTokens(f"{part.name} {list(fx.shape(part))} joins the branches and isn't [B, N, D]")
            heavy.append(part)
        return heavy

    def _only_for(self, part: Node, body: list[Node], experts: Node, gates: Node) -> list[Node]:
        """What of the body makes `part` and nothing that is always run: the router and what feeds it."""
        always_run = (experts, gates)
        nodes = []
        for node in body:
            makes_part = node is part or self.cone.feeds(node, part)
            if makes_part and not any(node is node_run or self.cone.feeds(node, node_run) for node_run in always_run):
                nodes.append(node)
        return nodes


def _gates(experts: Node) -> tuple[Node, Node]:
    """The weights in `sum(experts * weights, dim=1)`, and the sum.

    Raises:
        MixesTokens: the branches are combined in another way.
    """
    product = _through_casts(experts)
    operands = list(product.all_input_nodes)
    if product.target is not aten.mul.Tensor or len(operands) != 2:
        raise MixesTokens(f"{experts.name}: its branches aren't weighted by a product with their gates")
    total = _through_casts(product)
    dims = total.args[1] if total.target is aten.sum.dim_IntList else None
    if dims not in ([1], [-2]):
        raise MixesTokens(f"{product.name}: the weighted branches aren't summed a token")
    shape = fx.shape(experts)
    gates = next((operand for operand in operands if fx.shape(operand) == (*shape[:2], 1)), None)
    if gates is None:
        raise MixesTokens(f"{product.name}: the gates aren't [tokens, K, 1]")
    return gates, total


def _through_casts(node: Node) -> Node:
    """The only user of a value, behind casts."""
    while True:
        if len(node.users) != 1:
            raise MixesTokens(f"{node.name}: its branches are read {len(node.users)} times")
        node = next(iter(node.users))
        if node.target not in fx.CASTS:
            return node


def _value(node: Node, *lead: int) -> Value:
    """`lead`: batch and tokens, where they may lie in one axis of the node."""
    shape = fx.shape(node)
    if lead and shape[:2] != lead:
        shape = (*lead, *shape[1:])
    return Value(node.name, shape, name_of(fx.need(node).dtype))


def _plain(axes: TokenAxes) -> tuple[tuple[str, int, bool], ...]:
    return tuple((node.name, axis.dim, axis.merged) for node, axis in axes.of.items())
