"""Residual branches -> regions: what each one is (by its anchor), which belong together, and what it is called.

Before: branches, attention and expert anchors, MACs.  After: a `RegionMap`. Branches that share a matmul (the attention
of two streams, a feed-forward on both) are one region with several outputs. A shortcut within a feed-forward, or within
experts side by side, is a part of it; a residual around several others, or one that doesn't depend on the latent, is a
miss. One without a matmul isn't worth a word.
Does nothing where there are no residual branches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.regions import Region, RegionMap, Rejected
from moeca_compile.passes.analysis.region_of import region_of
from moeca_compile.passes.facts import Branch, Facts


def find_regions(gm: GraphModule, facts: Facts) -> Facts:
    cone = fx.Cone(gm)
    nodes = {node.name: node for node in cone.nodes}
    depends, macs = facts.dependence, facts.macs
    rejected = list(facts.rejected)
    accepted: list[Branch] = []
    heavy = [b for b in facts.branches if any(name in macs for name in b.body)]
    joined = {b.join: b for b in heavy}
    anchors = {a.node for a in facts.attention} | {e.node for e in facts.experts}
    shortcuts = {short.join for b in heavy for short in _shortcuts(b, joined, anchors)}
    for outer in heavy:
        if outer.join in shortcuts:
            continue
        inner = [joined[name] for name in outer.body if name in joined and name not in shortcuts]
        branch = _after_the_last(outer, inner, cone, nodes) if inner else outer
        position = _place(nodes[outer.join])
        if branch.reason:
            rejected.append(Rejected(branch.reason, *position))
        elif not any(name in macs for name in branch.body):
            rejected.append(
                Rejected(f"a residual around {len(inner)} others: each of them is a region of its own", *position)
            )
        elif depends.get(branch.cut) != "latent":
            rejected.append(Rejected("doesn't depend on the latent: hoisted, not cached", *position))
        elif fx.tensor(nodes[branch.cut]) is None:
            rejected.append(Rejected("its output isn't one tensor", *position))
        elif fx.has_unknown_size(nodes[branch.cut]):
            rejected.append(Rejected("the size of its output depends on data: no state can hold it", *position))
        else:
            accepted.append(branch)
    regions = []
    for group in _groups(accepted, macs):
        reader = _outside_reader(group, nodes, facts)
        if reader is None:
            inside = {name for branch in group for name in branch.body}
            cuts = [nodes[name] for name in dict.fromkeys(branch.cut for branch in group)]
            regions.append(region_of([node for name, node in nodes.items() if name in inside], cuts, facts))
        else:
            reason = f"its attention or experts are read outside it too, by {reader.name}, and would run all the same"
            rejected.append(Rejected(reason, *_place(nodes[group[0].join])))
    total = sum(macs.values())
    return replace(facts, rejected=tuple(rejected), regions=RegionMap(_unique_keys(regions), tuple(rejected), total))


def _place(join: Node) -> tuple[str, str, str]:
    """Of a rejected branch: its node, and the source line by number and text."""
    return join.name, fx.where(join), fx.code(join)


def _shortcuts(branch: Branch, joined: Mapping[str, Branch], anchors: set[str]) -> list[Branch]:
    """The residuals inside a branch that are no blocks: an mlp's own, or those of experts side by side. There are no
    attention and no routed experts in them, they share a trunk of their own, and none is inside another."""
    inner = [joined[name] for name in branch.body if name in joined]
    one_trunk = all(nested.trunk == inner[0].trunk != branch.trunk for nested in inner)
    plain = one_trunk and all(anchors.isdisjoint(nested.body) for nested in inner)
    joins = {nested.join for nested in inner}
    return inner if plain and all(joins.isdisjoint(nested.body) for nested in inner) else []


def _after_the_last(branch: Branch, inner: list[Branch], cone: fx.Cone, nodes: Mapping[str, Node]) -> Branch:
    """What lies behind the inner sum in `x + mlp(norm(x + attention(x)))`: the sum is only what the mlp sees."""
    cut, last = nodes[branch.cut], nodes[inner[-1].join]
    leaps = all(nested.trunk == branch.trunk for nested in inner)
    body = cone.between(last, cut) if leaps and last is not cut else []
    return replace(branch, body=tuple(node.name for node in body))


def _groups(branches: list[Branch], macs: Mapping[str, int]) -> list[list[Branch]]:
    """Branches that share a matmul or a cut, together; in graph order. One that reads another's cut stays apart."""
    groups: list[list[Branch]] = []
    for branch in branches:
        shared_group = next((group for group in groups if any(_belong(branch, other, macs) for other in group)), None)
        if shared_group is None:
            groups.append([branch])
        else:
            shared_group.append(branch)
    return groups


def _belong(a: Branch, b: Branch, macs: Mapping[str, int]) -> bool:
    if a.cut == b.cut:
        return True
    nested = a.cut in b.body or b.cut in a.body
    return not nested and any(name in macs for name in set(a.body).intersection(b.body))


def _outside_reader(group: list[Branch], nodes: dict[str, Node], facts: Facts) -> Node | None:
    """What reads an attention or expert call of this group other than through its cuts."""
    inside = {name for branch in group for name in branch.body}
    cuts = {branch.cut for branch in group}
    anchors = [a.node for a in facts.attention] + [e.node for e in facts.experts]
    pending = [name for name in anchors if name in inside]
    seen = set(pending)
    while pending:
        name = pending.pop()
        for user in nodes[name].users if name not in cuts else ():
            if user.name not in inside:
                return user
            if user.name not in seen:
                seen.add(user.name)
                pending.append(user.name)
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
