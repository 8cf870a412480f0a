"""State in, state out: the layout's slots, what each action reads and writes, and nothing shared by mistake."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_compile.graph import fx
from moeca_compile.graph.regions import Cut, Region, RegionMap
from moeca_compile.graph.variant import SLOTS, StateSlot, Variant
from moeca_compile.passes.transform.insert_state import insert_state
from moeca_compile.passes.transform.layout import state_layout
from moeca_compile.passes.transform.ports import COEFFICIENTS
from moeca_compile.pipeline import Analysis
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.forecast import MAX_KEPT
from tests.passes.blocks import analyzed, latent, routed, two_streams
from tests.tools import analyze_module, layout_of, ops, row, run_graph, schedule_of, variant_of, with_row

W = torch.randn(8, 8)


def layout(analysis: Analysis, *rows: str, order: int = 1) -> tuple[StateSlot, ...]:
    return layout_of(analysis, schedule_of(analysis, *rows, order=order))


def slots(analysis: Analysis, *rows: str, order: int = 1) -> list[tuple[int, int, str]]:
    return [(slot.region, slot.output, slot.slot) for slot in layout(analysis, *rows, order=order)]


# -- the layout -------------------------------------------------------------------------------------------------------


def test_a_full_schedule_keeps_nothing() -> None:
    assert slots(analyzed(), "CC", "CC") == []


def test_only_regions_that_are_ever_skipped_are_kept() -> None:
    assert slots(analyzed(), "CC", "CR") == [(1, 0, "y0")]
    assert slots(analyzed(), "CC", "FC") == [(0, 0, "y0"), (0, 0, "y1")]


def test_as_many_outputs_are_kept_as_the_order_asks() -> None:
    assert [slot for _, _, slot in slots(analyzed(), "CC", "FR", order=1)] == ["y0", "y1", "y0"]
    assert [slot for _, _, slot in slots(analyzed(), "CC", "FR", order=2)] == ["y0", "y1", "y2", "y0"]


def test_each_output_has_its_own_slots() -> None:
    assert slots(two_streams(), "CCC", "FCC") == [(0, 0, "y0"), (0, 0, "y1"), (0, 1, "y0"), (0, 1, "y1")]


def test_outputs_keep_their_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        half = analyze_module(lambda x: x + x @ W, latent())
    double = analyze_module(lambda x: x + x @ W.double(), latent().double())
    assert {(slot.dtype, slot.bytes) for slot in layout(half, "C", "F", order=2)} == {("bfloat16", 64 * 2)}
    assert {(slot.dtype, slot.bytes) for slot in layout(double, "C", "F", order=2)} == {("float64", 64 * 8)}


def test_names_are_zero_padded_so_that_they_sort_as_they_are_numbered() -> None:
    regions = RegionMap(tuple(region(f"r{i:02d}") for i in range(40)))
    schedule = Schedule((row("C" * 40), row("F" * 40)), regions.keys, order=2)
    names = [slot.name for slot in state_layout(regions, schedule)]
    assert len(names) == 120
    assert names == sorted(names)
    assert (names[0], names[-1]) == ("state_000", "state_119")


def region(key: str, shapes: tuple[tuple[int, ...], ...] = ((2, 3),), dtype: str = "float32") -> Region:
    names = tuple(f"{key}_{i}" for i in range(len(shapes)))
    cuts = tuple(Cut(name, shape, dtype, "cpu") for name, shape in zip(names, shapes, strict=True))
    return Region(key, "mlp", 0, cuts, names)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), order=st.integers(0, 2))
def test_bytes_are_those_of_the_tensors(data: st.DataObject, order: int) -> None:
    size = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
    shapes = st.lists(size, min_size=1, max_size=2).map(tuple)
    found = data.draw(st.lists(st.tuples(shapes, st.sampled_from(["float32", "bfloat16", "float64"])), max_size=3))
    regions = RegionMap(tuple(region(f"r{i}", *one) for i, one in enumerate(found)))
    letters = st.text("CRF" if order else "CR", min_size=len(found), max_size=len(found))
    rows = ["C" * len(found), *data.draw(st.lists(letters, max_size=4))]
    schedule = Schedule(tuple(map(row, rows)), regions.keys, order=order)
    total = 0
    for column, one in enumerate(regions):
        letters_of = {text[column] for text in rows}
        item = {"float32": 4, "bfloat16": 2, "float64": 8}[one.dtypes[0]]
        for shape in one.shapes:
            count = math.prod(shape)
            total += count * item * (1 + order if "F" in letters_of else "R" in letters_of)
    made = state_layout(regions, schedule)
    assert sum(slot.bytes for slot in made) == total
    assert all(slot.bytes == math.prod(slot.shape) * getattr(torch, slot.dtype).itemsize for slot in made)
    assert [slot.name for slot in made] == [f"state_{i:03d}" for i in range(len(made))]


# -- what each action reads and writes --------------------------------------------------------------------------------


def traffic(variant: Variant, kept: tuple[StateSlot, ...]) -> tuple[list[str], list[str], bool]:
    return [kept[i].slot for i in variant.reads], [kept[i].slot for i in variant.writes], variant.wants_coefficients


@pytest.mark.parametrize(
    ("order", "text", "reads", "writes", "coefficients"),
    [
        (0, "CR", ["y0"], [], False),
        (0, "RR", ["y0", "y0"], [], False),
        (0, "RC", ["y0"], ["y0"], False),
        (0, "CC", [], ["y0"], False),
        (1, "CF", ["y0", "y1"], [], True),
        (1, "CC", [], ["y0"], False),
        (1, "CR", ["y0"], [], False),
        (2, "CF", ["y0", "y1", "y2"], [], True),
        (2, "CC", [], ["y0"], False),
        (2, "CR", ["y0"], [], False),
    ],
)
def test_an_action_reads_what_it_needs_and_writes_what_it_changes(
    order: int, text: str, reads: list[str], writes: list[str], coefficients: bool
) -> None:
    """In a schedule that also skips the second region, so that its state is kept."""
    skip = "CF" if order else "CR"
    kept = layout(analyzed(), "CC", text, skip, order=order)
    assert traffic(variant_of(analyzed(), text, order, (skip,)), kept) == (reads, writes, coefficients)


def test_a_variant_s_inputs_are_the_model_s_then_state_then_coefficients() -> None:
    variant = variant_of(routed(), "CFRF", 2)
    names = [node.name for node in fx.placeholders(variant.gm)]
    inputs = routed().facts.inputs
    kept = layout(routed(), "CCCC", "CFRF", order=2)
    expected = [inputs[i].name for i in variant.takes] + [kept[i].name for i in variant.reads] + [COEFFICIENTS]
    assert names == expected
    assert fx.shape(fx.placeholders(variant.gm)[-1]) == (4, MAX_KEPT)
    assert list(variant.takes) == sorted(variant.takes)


def test_outputs_are_the_model_s_and_then_the_written_slots_in_layout_order() -> None:
    variant = variant_of(routed(), "CCCC", 2, ("FFFF",))
    kept = layout(routed(), "CCCC", "FFFF", order=2)
    values = list(fx.nodes_of(fx.output_node(variant.gm).args[0]))
    assert variant.outputs == 1
    assert variant.writes == (0, 3, 6, 9)
    for slot, node in zip((kept[i] for i in variant.writes), values[1:], strict=True):
        assert (fx.shape(node), str(fx.need(node).dtype)) == (slot.shape, f"torch.{slot.dtype}")


def test_a_reuse_costs_no_arithmetic() -> None:
    """One placeholder takes the region's place."""
    reused, full = ops(variant_of(analyzed(), "CR").gm), ops(analyzed().gm)
    assert not reused - full
    assert variant_of(analyzed(), "CR").node_count < variant_of(analyzed(), "CF").node_count


def test_an_empty_layout_leaves_the_graph_as_it_is() -> None:
    context = with_row(analyzed(), "CC")
    assert insert_state(analyzed().gm, context) is analyzed().gm


def test_building_variants_leaves_the_analyzed_graph_as_it_is() -> None:
    before = [node.format_node() for node in routed().gm.graph.nodes]
    for text in ("CCCC", "FFFF", "CFRC"):
        variant_of(routed(), text, 2)
    assert [node.format_node() for node in routed().gm.graph.nodes] == before
    assert fx.marked(routed().gm) == []


@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_variant_of_a_schedule_reads_the_same_layout(order: int) -> None:
    texts = ("CCCC", "RRRR", "CRCR") if order == 0 else ("CCCC", "FFFF", "CFRC", "RRRR")
    kept = layout(routed(), *texts, order=order)
    for text in texts:
        variant = variant_of(routed(), text, order, texts)
        state = {node.name: node for node in fx.placeholders(variant.gm) if node.name.startswith("state_")}
        for slot in kept:
            if slot.name in state:
                value = fx.need(state[slot.name])
                assert (tuple(value.shape), str(value.dtype)) == (slot.shape, f"torch.{slot.dtype}")


def test_a_model_may_have_inputs_that_are_called_like_state() -> None:
    def model(x: Tensor, state_000: Tensor, coefficients: Tensor) -> Tensor:
        return x + (x @ W) * state_000 * coefficients

    analysis = analyze_module(model, latent(), torch.rand(1), torch.rand(1))
    variant = variant_of(analysis, "F", 2)
    names = [node.name for node in fx.placeholders(variant.gm)]
    assert len(names) == len(set(names)) == len(variant.takes) + len(variant.reads) + 1
    assert variant.gm.code


# -- nothing is shared by mistake -------------------------------------------------------------------------------------


def returns_its_branch(x: Tensor) -> tuple[Tensor, Tensor]:
    h = x @ W
    return x + h, h


def call(variant: Variant, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    table = [torch.zeros(1, MAX_KEPT)] if variant.wants_coefficients else []
    return run_graph(variant.gm, (*([x] if variant.takes else []), *state, *table))


def test_a_state_that_is_also_an_output_is_written_as_a_copy() -> None:
    """The caller may change an output in place."""
    analysis, x = analyze_module(lambda x: returns_its_branch(x), latent()), latent()
    variant = variant_of(analysis, "C", 0, ("R",))
    takes = [one.name for one in analysis.facts.inputs]
    args = [W if name == "W" else x for name in (takes[i] for i in variant.takes)]
    y, h, kept = run_graph(variant.gm, tuple(args))
    assert torch.equal(h, kept)
    assert h.data_ptr() != kept.data_ptr() != y.data_ptr()


def test_a_state_that_a_variant_hands_out_is_a_copy() -> None:
    analysis, x = analyze_module(lambda x: returns_its_branch(x), latent()), latent()
    state = latent()
    _, h = call(variant_of(analysis, "R", 0), x, state)
    assert torch.equal(h, state)
    assert h.data_ptr() != state.data_ptr()


def test_a_state_is_written_contiguous_whatever_the_region_gives() -> None:
    """One memory format for all variants, so that any may follow any."""
    analysis = analyze_module(lambda x: x + (x.mT @ W[:4, :4]).mT, latent())
    variant = variant_of(analysis, "C", 2, ("F",))
    for node in list(fx.nodes_of(fx.output_node(variant.gm).args[0]))[variant.outputs :]:
        assert fx.need(node).is_contiguous()
    (cut,) = fx.resolve(analysis.gm, analysis.facts.regions.regions[0].outputs)
    assert not fx.need(cut).is_contiguous(), "the region gives a contiguous value: this test shows nothing"


def test_slots_are_the_outputs_that_a_forecast_may_weigh() -> None:
    assert SLOTS == ("y0", "y1", "y2", "y3")
    assert len(SLOTS) == MAX_KEPT


def test_a_number_of_the_table_is_read_once_with_one_operator() -> None:
    """A runtime that calls each operator pays for each: one a weight, two sums of products a region of order 1."""
    before, after = (ops(variant_of(two_streams(), text).gm) for text in ("RRR", "FRR"))
    assert after - before == Counter(
        {"aten.mul.Tensor": 4, "aten.add.Tensor": 2, "aten.select.int": 2, "aten.view.default": 1}
    )
