"""One span of consecutive blocks in place of its regions, where the granularity asks for it.

Before: regions.  After: a `RegionMap` of one `span`, or of nothing and a miss that says why. A span is all nodes on the
paths from its entries (what its blocks' residual branches start from) to its exits (the last residual adds); its
outputs are those of them that are read outside. A slice of the blocks gives the entries directly; a long skip gives
them by its ends: what lies between the early feature and the late one that it joins (Skip-Cache, arXiv 2411.17616).
What is outside the span is no region: it is computed at every step. A slice of the blocks is kept as the change that
it makes to each stream (as in Delta-DiT, arXiv 2406.01125): what left it last time would hide the blocks before it.
Does nothing where each region is a column of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.regions import Region, RegionMap, Rejected
from moeca_compile.passes.analysis.region_of import region_of
from moeca_compile.passes.facts import Facts
from moeca_compile.schedule.granularity import Granularity


@dataclass(frozen=True)
class _Ends:
    """Where a span begins and ends."""

    entries: Sequence[Node]
    exits: Sequence[Node]
    relative: bool = False


def find_spans(gm: GraphModule, facts: Facts) -> Facts:
    granularity = facts.granularity
    if granularity.kind == "region" or not len(facts.regions):
        return facts
    layout = _Blocks(fx.Cone(gm), facts)
    ends = layout.skip(granularity.outer) if granularity.kind == "skip" else layout.slice(granularity)
    span = ends if isinstance(ends, str) else layout.span(ends)
    if isinstance(span, str):
        rejected = (*facts.rejected, Rejected(span))
        return replace(facts, rejected=rejected, regions=RegionMap((), rejected, facts.regions.total_macs))
    return replace(facts, regions=RegionMap((span,), facts.rejected, facts.regions.total_macs))


class _Blocks:
    """The blocks of a graph: regions under one numbered module, `blocks.3`, in graph order."""

    def __init__(self, cone: fx.Cone, facts: Facts) -> None:
        self.cone, self.facts = cone, facts
        self.nodes = {node.name: node for node in cone.nodes}
        self.cuts: dict[str, set[str]] = {}
        for region in facts.regions:
            self.cuts.setdefault(_block(region.key), set()).update(region.outputs)
        self.names = list(self.cuts)
        self.joins = {
            name: [self.nodes[branch.join] for branch in facts.branches if branch.cut in cuts]
            for name, cuts in self.cuts.items()
        }

    def slice(self, granularity: Granularity) -> _Ends | str:
        chosen = self.names[granularity.start : granularity.stop]
        if not chosen:
            text = f"{granularity.start}:{granularity.stop} are none of the {len(self.names)} blocks"
            return f"blocks {text}, {self.names[0]} to {self.names[-1]}"
        joins = [join for name in chosen for join in self.joins[name]]
        trunks = [self.nodes[branch.trunk] for branch in self.facts.branches if self.nodes[branch.join] in joins]
        inside = set(joins)
        entries = [t for t in trunks if t not in inside and not any(self.cone.feeds(join, t) for join in joins)]
        exits = [join for join in joins if not any(self.cone.feeds(join, other) for other in joins)]
        return _Ends(list(dict.fromkeys(entries)), exits, granularity.relative)

    def skip(self, outer: int) -> _Ends | str:
        """The widest long skip before whose early end there are `outer` blocks."""
        ends_by_count: dict[int, _Ends] = {}
        for early, late in self._long_skips():
            before = sum(any(join is early or self.cone.feeds(join, early) for join in j) for j in self.joins.values())
            ends_by_count.setdefault(before, _Ends([early], [late]))
        if outer in ends_by_count:
            return ends_by_count[outer]
        counts = f"those in this model keep {sorted(ends_by_count)}" if ends_by_count else "this model has none"
        return (
            f"no long skip (an early and a late feature concatenated or added) keeps {outer} outer blocks: {counts}. "
            "'blocks:START:STOP' caches a slice of the blocks"
        )

    def _long_skips(self) -> Iterator[tuple[Node, Node]]:
        """(early, late), from the outermost on."""
        pairs = [(self.nodes[branch.trunk], self.nodes[branch.cut]) for branch in self.facts.branches]
        for node in self.cone.nodes:
            parts = list(fx.nodes_of(node.args[0])) if node.target is aten.cat.default else []
            if len(parts) == 2 and fx.shape(parts[0]) == fx.shape(parts[1]):
                pairs += [(a, b) for a, b in (parts, parts[::-1]) if self.cone.feeds(a, b)]
        long = [pair for pair in pairs if len(self._within(set(self.cone.between(*pair)))) > 1]
        return iter(sorted(long, key=lambda pair: self.cone.index[pair[0]]))

    def _within(self, body: set[Node]) -> list[str]:
        """The blocks of which some residual add is in `body`."""
        return [name for name, joins in self.joins.items() if body.intersection(joins)]

    def span(self, ends: _Ends) -> Region | str:
        paths = [(a, b) for a in ends.entries for b in ends.exits if self.cone.feeds(a, b)]
        reached = {node for a, b in paths for node in self.cone.between(a, b)}
        body = [node for node in self.cone.nodes if node in reached]
        cuts = [node for node in body if any(user not in reached for user in node.users)]
        for cut in cuts:
            val = fx.tensor(cut)
            if val is None or not val.is_floating_point() or fx.has_unknown_size(cut):
                what = "isn't a floating-point tensor of known size"
                return f"{cut.name} ({fx.where(cut)}) in the span is read outside it and {what}"
        bases = [self._base(cut, ends.entries) for cut in cuts] if ends.relative else []
        entries = [base for base in bases if base is not None]
        if len(entries) < len(bases):
            stray = cuts[bases.index(None)]
            return (
                f"{stray.name} ({fx.where(stray)}) leaves the blocks, but nothing of its shape enters: slice otherwise"
            )
        names = self._within(reached)
        key = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
        return region_of(body, cuts, self.facts, kind="span", key=key, bases=entries)

    def _base(self, cut: Node, entries: Sequence[Node]) -> Node | None:
        """The entry that `cut`'s stream began at: the nearest of its shape, for residual adds are the shortest way."""
        pending, seen = [cut], {cut}
        for node in pending:  # grows: breadth first
            if node in entries and fx.fills(node, cut):
                return node
            new = [source for source in node.all_input_nodes if source not in seen]
            seen.update(new)
            pending += new
        return None


def _block(key: str) -> str:
    """`blocks.3` of `blocks.3.attn`: up to the first number; the key itself where there is none."""
    parts = key.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])
