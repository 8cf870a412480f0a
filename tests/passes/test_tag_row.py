"""The row's decision is written on each region's outputs, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeca_compile.errors import InvariantError
from moeca_compile.graph import fx
from moeca_compile.graph.regions import RegionMap
from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.manager import PassManager
from moeca_compile.passes.transform.tag_row import tag_row
from moeca_compile.pipeline import Analysis
from tests.passes.blocks import analyzed, routed, two_streams
from tests.tools import row, with_row


def tagged(analysis: Analysis, text: str) -> list[tuple[str, fx.Mark]]:
    gm = PassManager().rewrite((tag_row,), analysis.gm, with_row(analysis, text))
    return [(node.name, mark) for node, mark in fx.marked(gm)]


@pytest.mark.parametrize("text", ["CCCC", "CRFC", "FFFF", "RRCF"])
def test_every_region_s_output_gets_its_action(text: str) -> None:
    regions = routed().facts.regions
    expected = [(r.outputs[0], fx.Mark(i, 0, a)) for i, (r, a) in enumerate(zip(regions, row(text), strict=True))]
    assert tagged(routed(), text) == expected


def test_each_output_of_a_region_is_marked() -> None:
    both, _, _ = two_streams().facts.regions
    found = dict(tagged(two_streams(), "FCC"))
    assert [found[name] for name in both.outputs] == [fx.Mark(0, 0, row("F")[0]), fx.Mark(0, 1, row("F")[0])]


def test_nothing_but_the_marks_changes() -> None:
    analysis = analyzed()
    gm = PassManager().rewrite((tag_row,), analysis.gm, with_row(analysis, "CF"))
    assert [n.format_node() for n in gm.graph.nodes] == [n.format_node() for n in analysis.gm.graph.nodes]
    assert fx.marked(analysis.gm) == []


@pytest.mark.parametrize("text", ["C", "CCC"])
def test_a_row_of_another_length_is_refused_by_the_pass_s_name(text: str) -> None:
    with pytest.raises(InvariantError, match="pass tag_row failed"):
        tagged(analyzed(), text)


def test_a_region_of_another_graph_is_refused_by_the_node_s_name() -> None:
    region = analyzed().facts.regions.regions[0]
    foreign = replace(region, cuts=(replace(region.cuts[0], node="nowhere"),))
    facts = replace(analyzed().facts, regions=RegionMap((foreign,)))
    context = RewriteRequest(facts, row("F"))
    with pytest.raises(InvariantError, match=r"no node named \['nowhere'\]"):
        tag_row(analyzed().gm, context)
