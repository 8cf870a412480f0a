"""Residual branches -> regions: what each one is (by its anchor), which belong together, and what it is called.

Before: branches, attention and expert anchors, MACs.  After: a `RegionMap`. Branches that share one attention (two
streams, MMDiT) or one expert call are one region with several outputs. A branch that holds other regions, or doesn't
depend on the latent, is a miss; one without a matmul isn't worth a word.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch.fx import GraphModule, Node

from moeca_compile import fx
from moeca_compile.passes.context import Branch, Context
from moeca_compile.passes.region_of import region_of
from moeca_compile.regions import Miss, Region, RegionMap


def find_regions(gm: GraphModule, ctx: Context) -> Context:
    nodes = {node.name: node for node in gm.graph.nodes}
    depends, macs = dict(ctx.dependence), dict(ctx.macs)
    misses = list(ctx.misses)
    kept: list[Branch] = []
    heavy = [b for b in ctx.branches if any(name in macs for name in b.body)]
    joins = {b.join for b in heavy}
    for branch in heavy:
        inner = joins.intersection(branch.body)
        at = (branch.join, fx.where(nodes[branch.join]))
        if inner:
            misses.append(Miss(f"a residual around {len(inner)} others: each of them is a region of its own", *at))
        elif depends.get(branch.cut) != "latent":
            misses.append(Miss("doesn't depend on the latent: it could be computed once, not cached", *at))
        elif fx.tensor(nodes[branch.cut]) is None:
            misses.append(Miss("its output isn't one tensor", *at))
        else:
            kept.append(branch)
    regions = []
    for group in _groups(kept, ctx):
        reader = _outside_reader(group, nodes, ctx)
        if reader is None:
            inside = {name for branch in group for name in branch.body}
            cuts = [nodes[name] for name in dict.fromkeys(branch.cut for branch in group)]
            regions.append(region_of([node for name, node in nodes.items() if name in inside], cuts, ctx))
        else:
            reason = f"its attention or experts are read outside it too, by {reader.name}, and would run all the same"
            misses.append(Miss(reason, group[0].join, fx.where(nodes[group[0].join])))
    total = sum(macs.values())
    return replace(ctx, misses=tuple(misses), regions=RegionMap(_unique_keys(regions), tuple(misses), total))


def _groups(branches: list[Branch], ctx: Context) -> list[list[Branch]]:
    """Branches that share an anchor or a cut, together; in graph order of their first cut."""
    anchors = {a.node for a in ctx.attention} | {e.node for e in ctx.experts}
    groups: list[tuple[set[str], list[Branch]]] = []
    for branch in branches:
        own = {branch.cut, *anchors.intersection(branch.body)}
        home = next(((shared, group) for shared, group in groups if shared & own), None)
        if home is None:
            groups.append((own, [branch]))
        else:
            home[0].update(own)
            home[1].append(branch)
    return [group for _, group in groups]


def _outside_reader(group: list[Branch], nodes: dict[str, Node], ctx: Context) -> Node | None:
    """What reads an attention or expert call of this group other than through its cuts."""
    inside = {name for branch in group for name in branch.body}
    cuts = {branch.cut for branch in group}
    anchors = [a.node for a in ctx.attention] + [e.node for e in ctx.experts]
    front = [name for name in anchors if name in inside]
    seen = set(front)
    while front:
        name = front.pop()
        for user in nodes[name].users if name not in cuts else ():
            if user.name not in inside:
                return user
            if user.name not in seen:
                seen.add(user.name)
                front.append(user.name)
    return None


def _unique_keys(regions: list[Region]) -> tuple[Region, ...]:
    """Regions that would share a name get their kind appended, and then a number."""
    count = Counter(region.key for region in regions)
    named = [replace(r, key=f"{r.key}.{r.kind}") if count[r.key] > 1 else r for r in regions]
    seen: Counter[str] = Counter()
    result = []
    for order, region in enumerate(named):
        seen[region.key] += 1
        key = region.key if seen[region.key] == 1 else f"{region.key}.{seen[region.key]}"
        layer = region.layer if region.layer >= 0 else order
        result.append(replace(region, key=key, layer=layer))
    return tuple(result)
