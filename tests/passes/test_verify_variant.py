"""A variant that breaks its promise is refused, with the region's and the node's name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.fx import GraphModule

from moeca_compile.errors import InvariantError
from moeca_compile.graph import fx
from moeca_compile.graph.fx import copied
from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.transform.verify_variant import verify_variant
from moeca_compile.pipeline import Analysis
from tests.passes.blocks import analyzed, routed, two_streams
from tests.tools import layout_of, row, schedule_of, variant_of


def built(analysis: Analysis, text: str, *among: str, order: int = 1) -> tuple[GraphModule, RewriteRequest]:
    """A good variant and the context that it was made with."""
    full = "C" * len(text)
    layout = layout_of(analysis, schedule_of(analysis, full, text, *among, order=order))
    variant = variant_of(analysis, text, order, among)
    return copied(variant.gm), RewriteRequest(analysis.facts, row(text), layout)


@pytest.mark.parametrize("text", ["CCCC", "FFFF", "CRCF", "RCFC"])
def test_a_good_variant_passes_unchanged(text: str) -> None:
    gm, context = built(routed(), text)
    nodes = [n.format_node() for n in gm.graph.nodes]
    assert verify_variant(gm, context) is gm
    assert [n.format_node() for n in gm.graph.nodes] == nodes


@pytest.mark.parametrize("action", ["REUSE", "FORECAST"])
def test_a_region_that_should_be_skipped_and_is_still_there_is_refused(action: str) -> None:
    gm, context = built(analyzed(), "CC")
    context = replace(context, row=row(f"C{action[0]}"))
    with pytest.raises(InvariantError, match=rf"region body\.mlp: {action}, but its output linear_\d+ is still there"):
        verify_variant(gm, context)


def test_a_region_that_should_run_and_is_gone_is_refused() -> None:
    gm, context = built(analyzed(), "FC")
    with pytest.raises(InvariantError, match=r"region body\.attn: COMPUTE, but its output linear_\d+ is gone"):
        verify_variant(gm, replace(context, row=row("CC")))


def test_one_output_of_two_that_is_still_there_is_refused() -> None:
    gm, context = built(two_streams(), "CCC")
    both = context.facts.regions.regions[0]
    (second,) = fx.resolve(gm, both.outputs[1:])
    (first,) = fx.resolve(gm, both.outputs[:1])
    first.replace_all_uses_with(fx.placeholders(gm)[0])  # any value will do
    gm.graph.erase_node(first)
    with pytest.raises(InvariantError, match=f"FORECAST, but its output {second.name} is still there"):
        verify_variant(gm, replace(context, row=row("FCC"), layout=()))


@pytest.mark.parametrize(("text", "kind"), [("CFCC", "experts"), ("FCCC", "scaled_dot_product_attention")])
def test_an_anchor_that_would_still_run_is_refused(text: str, kind: str) -> None:
    """The region's output is replaced, but something else keeps its heavy operator alive."""
    gm, context = built(routed(), "CCCC", order=0)
    region = next(r for r, a in zip(context.facts.regions, row(text), strict=True) if a.name == "FORECAST")
    (cut,) = fx.resolve(gm, region.outputs)
    anchor = node_of(gm, kind)
    output = fx.output_node(gm)
    cut.replace_all_uses_with(fx.placeholders(gm)[0])
    gm.graph.erase_node(cut)
    output.args = ((*output.args[0], anchor),)  # type: ignore[misc]
    with pytest.raises(InvariantError, match=rf"region {region.key}: FORECAST, but \['{kind}'\] would still run"):
        verify_variant(gm, replace(context, row=row(text), layout=()))


def node_of(gm: GraphModule, name: str) -> torch.fx.Node:
    return fx.resolve(gm, (name,))[0]


@pytest.mark.parametrize("change", [{"shape": (9,)}, {"dtype": "bfloat16"}])
def test_a_state_written_otherwise_than_laid_out_is_refused(change: dict[str, object]) -> None:
    gm, context = built(analyzed(), "CC", "FF")
    wrong = tuple(replace(slot, **change) for slot in context.layout)  # type: ignore[arg-type]
    with pytest.raises(InvariantError, match=r"state_000: written as .*, the layout says"):
        verify_variant(gm, replace(context, layout=wrong))


def test_a_broken_graph_is_refused() -> None:
    gm, context = built(analyzed(), "CC")
    first, last = fx.placeholders(gm)[0], fx.output_node(gm)
    last.append(first)
    with pytest.raises(RuntimeError, match=r"topological|before"):
        verify_variant(gm, context)
