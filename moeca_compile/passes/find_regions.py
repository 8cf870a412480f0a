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
from moeca_compile.fx import aten
from moeca_compile.passes.context import Branch, Context
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
    weights = {one.name: one.label for one in ctx.inputs if one.is_weight}
    regions = []
    for group in _groups(kept, ctx):
        reader = _outside_reader(group, nodes, ctx)
        if reader is None:
            regions.append(_region(group, nodes, ctx, weights, macs))
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


def _region(
    group: list[Branch], nodes: dict[str, Node], ctx: Context, weights: dict[str, str], macs: dict[str, int]
) -> Region:
    inside = {name for branch in group for name in branch.body}
    body = tuple(name for name in nodes if name in inside)  # graph order
    attention = tuple(a for a in ctx.attention if a.node in inside)
    experts = tuple(e for e in ctx.experts if e.node in inside)
    routed = experts or any(nodes[name].target is aten.topk.default for name in body)
    kind = "span" if attention and experts else "attention" if attention else "experts" if routed else "mlp"
    cuts = tuple(nodes[name] for name in dict.fromkeys(branch.cut for branch in group))
    values = [fx.tensor(cut) for cut in cuts]
    parameters = _parameters([nodes[name] for name in body], weights)
    key = _key([nodes[name] for name in body], weights) or fx.module_path(cuts[0]) or kind
    return Region(
        key=key,
        kind=kind,
        layer=next((int(part) for part in key.split(".") if part.isdigit()), -1),
        outputs=tuple(cut.name for cut in cuts),
        body=body,
        shapes=tuple(tuple(v.shape) for v in values if v is not None),
        dtypes=tuple(str(v.dtype).removeprefix("torch.") for v in values if v is not None),
        devices=tuple(str(v.device) for v in values if v is not None),
        parameters=parameters,
        macs=sum(macs.get(name, 0) for name in body),
        state_bytes=sum(v.numel() * v.element_size() for v in values if v is not None),
        experts=experts,
        attention=attention,
    )


def _parameters(body: list[Node], weights: dict[str, str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = {}
    for node in body:
        for source in node.all_input_nodes:
            origin = fx.strip(source, fx.is_view_or_part)
            if origin.name in weights:
                found[weights[origin.name]] = fx.shape(origin)
    return tuple(found.items())


def _key(body: list[Node], weights: dict[str, str]) -> str:
    """The longest dotted prefix of the modules whose weights the region multiplies by."""
    multiplies = [node for node in body if node.target in fx.MATMULS or fx.is_experts(node)]
    modules = [label.rpartition(".")[0].split(".") for label, _ in _parameters(multiplies, weights)]
    prefix: list[str] = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)


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
