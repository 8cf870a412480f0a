"""MoE layers: `moeca::experts` calls and the router that feeds each one.

A router is a top-k over scores that softmax or sigmoid made of a projection. A top-k that leads to no
`moeca::experts` is a miss: its dispatch wasn't recognised, so its layer can be cached as a whole but not by branch.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule, Node

from moeca_compile import fx
from moeca_compile.fx import aten
from moeca_compile.passes.context import Context
from moeca_compile.regions import ExpertsInfo, Miss, RouterInfo


def find_experts(gm: GraphModule, ctx: Context) -> Context:
    cone = fx.Cone(gm)
    topks = [node for node in cone.nodes if node.target is aten.topk.default and isinstance(node.args[1], int)]
    calls = [node for node in cone.nodes if fx.is_experts(node)]
    found: list[ExpertsInfo] = []
    misses, used = list(ctx.misses), set[Node]()
    for node in calls:
        ids = fx.arg(node, 1)
        above = [topk for topk in topks if cone.feeds(topk, ids) and _chooses(cone, topk, ids)]
        router = above[-1] if above else None
        used.update(above)
        found.append(ExpertsInfo(node.name, ids.name, _router(router) if router is not None else None))
        if router is None:
            misses.append(Miss("expert ids don't come from a top-k: no branch cache for it", node.name, fx.where(node)))
    for topk in topks:
        if topk not in used:
            reason = "a top-k that feeds no moeca::experts: its layer is cached as a whole, not by branch"
            misses.append(Miss(reason, topk.name, fx.where(topk)))
    return replace(ctx, experts=tuple(found), misses=tuple(misses))


def _chooses(cone: fx.Cone, topk: Node, ids: Node) -> bool:
    """Whether the ids come from this top-k itself, and not from a layer behind it."""
    return not any(
        node.target in fx.MATMULS or node.target is fx.SDPA or fx.is_experts(node) for node in cone.between(topk, ids)
    )


def _router(topk: Node) -> RouterInfo:
    scores, top_k = fx.arg(topk, 0), topk.args[1]
    assert isinstance(top_k, int)
    return RouterInfo(topk.name, scores.name, fx.shape(scores)[-1], top_k)
