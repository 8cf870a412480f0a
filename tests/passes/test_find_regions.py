"""Branches become regions: kind, key, layer, cost, grouping; every miss; every rule of the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_compile.errors import InvariantError
from moeca_compile.graph import fx
from moeca_compile.graph.regions import Cut, Region, RegionMap, Rejected, fingerprint
from moeca_compile.passes.analysis.find_regions import find_regions
from moeca_compile.passes.facts import Branch, Facts
from moeca_compile.pipeline import Analysis
from tests.passes.blocks import (
    DIM,
    WAYS,
    Attention,
    Block,
    Mlp,
    OneStream,
    Routed,
    Stack,
    Timed,
    TwoStreams,
    analyzed,
    latent,
    routed,
    two_streams,
)
from tests.tools import analyze_module, node

W = torch.randn(DIM, DIM)
STEP_ONLY = "doesn't depend on the latent: hoisted, not cached"


def timed(body: Any, dtype: torch.dtype = torch.float32, x: Tensor | None = None) -> Analysis:
    x = latent() if x is None else x
    return analyze_module(Timed(body).to(dtype), x.to(dtype), torch.full((x.shape[0],), 0.5, dtype=dtype))


def named(analysis: Analysis) -> list[tuple[str, str, int]]:
    return [(r.key, r.kind, r.layer) for r in analysis.facts.regions]


def reasons(analysis: Analysis) -> list[str]:
    return [miss.reason for miss in analysis.facts.rejected]


# -- kind, key, layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_a_block_is_an_attention_and_an_mlp_however_it_is_written(way: str) -> None:
    analysis = analyzed(way)
    assert sorted(named(analysis)) == [("body.attn", "attention", 0), ("body.mlp", "mlp", 1)]
    assert reasons(analysis) == []


def test_keys_are_the_modules_of_the_weights_and_layers_their_numbers() -> None:
    assert named(routed()) == [
        ("body.blocks.0.attn", "attention", 0),
        ("body.blocks.0.mlp", "experts", 0),
        ("body.blocks.1.attn", "attention", 1),
        ("body.blocks.1.mlp", "experts", 1),
    ]


def test_two_streams_that_share_an_attention_are_one_region_with_two_outputs() -> None:
    analysis = two_streams()
    both, image, text = analysis.facts.regions
    assert (both.kind, len(both.outputs), both.shapes) == ("attention", 2, ((2, 4, DIM), (2, 3, DIM)))
    assert both.state_bytes == 2 * 7 * DIM * 4
    assert len(both.attention) == 1
    assert (image.key, image.kind, text.key, text.kind) == ("body.image_mlp", "mlp", "body.text_mlp", "mlp")
    weights = {name for name, _ in both.parameters}
    assert {"body.image.proj.weight", "body.text.proj.weight", "body.text.qkv.bias"} <= weights


def test_the_last_block_of_two_streams_has_one_output() -> None:
    both, image = timed(TwoStreams(last=True)).facts.regions
    assert len(both.outputs) == len(image.outputs) == 1


def test_a_block_with_one_linear_out_is_one_attention() -> None:
    assert named(timed(Stack(OneStream(), OneStream()))) == [
        ("body.blocks.0", "attention", 0),
        ("body.blocks.1", "attention", 1),
    ]


def test_attention_and_experts_in_one_branch_are_a_span() -> None:
    (region,) = timed(Block("parallel, one sum", mlp=Routed())).facts.regions
    assert (region.key, region.kind) == ("body", "span")
    assert (len(region.attention), len(region.experts)) == (1, 1)


def test_attention_and_mlp_in_one_branch_are_an_attention() -> None:
    (region,) = analyzed("parallel, one sum").facts.regions
    assert region.kind == "attention"


def test_a_block_that_runs_twice_is_four_regions_with_keys_of_their_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.block(self.block(x, c), c)

    assert [key for key, *_ in named(timed(Twice()))] == [
        "body.block.attn.attention", "body.block.mlp.mlp", "body.block.attn.attention.2", "body.block.mlp.mlp.2",
    ]  # fmt: skip


def test_regions_without_weights_are_named_after_their_module_or_kind() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Bare(), Bare()])

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    assert named(timed(Holder())) == [("body.blocks.0", "attention", 0), ("body.blocks.1", "attention", 1)]
    analysis = analyze_module(lambda x: x + (x @ W) + F.scaled_dot_product_attention(x, x, x), latent())
    assert named(analysis) == [("mlp", "mlp", 0), ("attention", "attention", 1)]


def test_keys_do_not_come_from_norms_or_biases() -> None:
    """Only what a region multiplies by says whose it is."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.ffn = nn.LayerNorm(DIM), Mlp()

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + self.ffn(self.norm(x))

    (region,) = timed(Shared()).facts.regions
    assert region.key == "body.ffn"
    assert "body.norm.weight" in {name for name, _ in region.parameters}


# -- what a region knows ----------------------------------------------------------------------------------------------


def test_body_is_in_graph_order_and_ends_in_the_outputs() -> None:
    names = [n.name for n in routed().gm.graph.nodes]
    for region in routed().facts.regions:
        assert list(region.body) == sorted(region.body, key=names.index)
        assert region.body[-1] == region.outputs[-1]


def test_no_node_belongs_to_two_regions() -> None:
    bodies = [name for region in routed().facts.regions for name in region.body]
    assert len(set(bodies)) == len(bodies)


def test_cost_and_bytes_are_those_of_the_body() -> None:
    macs = dict(routed().facts.macs)
    regions = routed().facts.regions
    for region in regions:
        assert region.macs == sum(macs.get(name, 0) for name in region.body) > 0
        assert region.state_bytes == 2 * 4 * DIM * 4
        (cut,) = region.cuts
        assert (cut.shape, cut.dtype, cut.device, cut.base) == ((2, 4, DIM), "float32", "cpu", "")
    assert regions.total_macs == sum(macs.values()) > sum(region.macs for region in regions)


def test_parameters_have_names_and_shapes() -> None:
    _, with_shared, _, without = routed().facts.regions
    assert dict(with_shared.parameters) == {
        "body.blocks.0.norm2.weight": (DIM,), "body.blocks.0.norm2.bias": (DIM,),
        "body.blocks.0.mlp.router.weight": (3, DIM),
        **{f"body.blocks.0.mlp.up.{e}": (6, DIM) for e in range(3)},
        **{f"body.blocks.0.mlp.down.{e}": (DIM, 6) for e in range(3)},
        "body.blocks.0.mlp.shared.fc1.weight": (12, DIM), "body.blocks.0.mlp.shared.fc1.bias": (12,),
        "body.blocks.0.mlp.shared.fc2.weight": (DIM, 12), "body.blocks.0.mlp.shared.fc2.bias": (DIM,),
    }  # fmt: skip
    assert not any("shared" in name for name, _ in without.parameters)


def test_parameters_are_seen_through_casts() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        analysis = timed(Block())
    assert named(analysis) == named(analyzed("plain"))
    assert {r.dtypes for r in analysis.facts.regions} == {("bfloat16",)}
    assert [r.state_bytes for r in analysis.facts.regions] == [2 * 4 * DIM * 2] * 2


# -- the fingerprint --------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_weights_not_of_batch_or_dtype() -> None:
    first = analyzed("plain").facts.regions.fingerprint
    assert first == timed(Block(), x=torch.randn(3, 6, DIM)).facts.regions.fingerprint
    assert first == timed(Block(), dtype=torch.bfloat16).facts.regions.fingerprint
    assert first == analyzed().facts.regions.fingerprint


def test_the_fingerprint_tells_other_shapes_and_other_layers_apart() -> None:
    first = analyzed("plain").facts.regions.fingerprint
    assert first != timed(Block(mlp=Mlp(hidden=16))).facts.regions.fingerprint
    assert first != timed(Stack(Block())).facts.regions.fingerprint


CUT = Cut("n", (1,), "float32", "cpu")


def region(key: str = "a", kind: str = "mlp", **changes: Any) -> Region:
    return replace(Region(key, kind, 0, (CUT,), ("n",)), **changes)


@pytest.mark.parametrize(
    "change", [{"key": "b"}, {"kind": "attention"}, {"parameters": (("w", (2,)),)}, {"cuts": (CUT, CUT)}]
)
def test_the_fingerprint_hashes_key_kind_parameter_shapes_and_output_count(change: dict[str, Any]) -> None:
    assert fingerprint((region(),)) != fingerprint((region(**change),))


@pytest.mark.parametrize(
    "change", [{"cuts": (Cut("m", (9,), "bfloat16", "cuda", 2, "k"),)}, {"macs": 7}, {"body": ("x", "n")}]
)
def test_the_fingerprint_hashes_nothing_else(change: dict[str, Any]) -> None:
    assert fingerprint((region(),)) == fingerprint((region(**change),))


def test_the_fingerprint_depends_on_the_order() -> None:
    assert fingerprint((region("a"), region("b"))) != fingerprint((region("b"), region("a")))


# -- misses -----------------------------------------------------------------------------------------------------------


def test_a_residual_around_others_is_a_miss_and_they_are_regions() -> None:
    analysis = timed(Stack(Block(), Block(), around=True))
    assert len(analysis.facts.regions) == 4
    (miss,) = analysis.facts.regions.rejected
    assert miss.reason == "a residual around 4 others: each of them is a region of its own"
    assert miss.where.startswith("blocks.py:")
    assert node(analysis.gm, miss.node).target is fx.aten.add.Tensor


def test_a_branch_that_only_depends_on_the_step_is_a_miss() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.block = Mlp(), Block("gate left")

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.block(x, c + self.fc(c))

    analysis = timed(Embedding())
    assert reasons(analysis) == [STEP_ONLY]
    assert [kind for _, kind, _ in named(analysis)] == ["attention", "mlp"]


def test_a_branch_of_constants_is_a_miss() -> None:
    analysis = timed(lambda x, c: x * (W + W.tanh() @ W).sum())
    assert reasons(analysis) == [STEP_ONLY]


def test_attention_that_is_read_elsewhere_is_a_miss_that_names_the_reader() -> None:
    def features(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h = F.scaled_dot_product_attention(x @ W, x, x)
        return x + h @ W, h

    analysis = timed(features)
    reason = "its attention or experts are read outside it too, by output, and would run all the same"
    assert reasons(analysis) == [reason]
    assert named(analysis) == []


def test_attention_whose_output_also_gates_a_later_branch_is_a_miss_and_the_other_a_region() -> None:
    def model(x: Tensor, c: Tensor) -> Tensor:
        h = F.scaled_dot_product_attention(x @ W, x, x)
        x = x + h @ W
        return x + (x @ W) * h.mean()

    analysis = timed(model)
    assert [reason.split(",")[1] for reason in reasons(analysis)] == [" by mean"]
    assert [kind for _, kind, _ in named(analysis)] == ["mlp"]


def test_router_logits_among_the_outputs_leave_the_experts_a_region() -> None:
    class Logits(Routed):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.router(x)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = Logits()

        def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            y, logits = self.moe(x)
            return x + y, logits

    assert named(timed(Holder())) == [("body.moe", "experts", 0)]


def test_an_output_that_is_no_tensor_is_a_miss() -> None:
    analysis = timed(Block())
    pair = node(analysis.gm, analysis.facts.regions.regions[0].body[0])
    branch = Branch("add_1", "x", pair.name, analysis.facts.regions.regions[0].body)
    pair.meta["val"] = (fx.value(pair), fx.value(pair))
    context = find_regions(analysis.gm, replace(analysis.facts, branches=(branch,), rejected=()))
    assert [miss.reason for miss in context.rejected] == ["its output isn't one tensor"]
    assert len(context.regions) == 0


def test_a_branch_without_a_matmul_is_not_worth_a_word() -> None:
    analysis = timed(lambda x, c: x + c.unsqueeze(1) * x.tanh())
    assert (named(analysis), reasons(analysis)) == ([], [])
    assert len(analysis.facts.branches) == 1


# -- branches that share --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["attention", "mlp"])
def test_one_branch_that_joins_two_trunks_is_one_region_with_one_output(core: str) -> None:
    def model(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h = F.scaled_dot_product_attention(x @ W, x, x) if core == "attention" else (x @ W).relu() @ W
        return x + h, x + c.unsqueeze(1) * h

    (only,) = timed(model).facts.regions
    assert (only.kind, len(only.outputs)) == (core, 1)
    assert only.state_bytes == 2 * 4 * DIM * 4


def test_a_branch_that_reads_another_is_a_region_of_its_own() -> None:
    def model(x: Tensor, c: Tensor) -> Tensor:
        a = x @ W
        return x + a + a.relu() @ W

    inner, outer = timed(model).facts.regions
    assert set(inner.body) < set(outer.body)


def test_two_experts_calls_in_one_branch_are_one_region() -> None:
    (_, both) = timed(Block(mlp=nn.Sequential(Routed(), Routed()))).facts.regions
    assert (both.kind, len(both.experts)) == ("experts", 2)


# -- the data's own rules ---------------------------------------------------------------------------------------------


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvariantError, match=r"region a: kind 'head' is none of \('attention', 'experts'"):
        region(kind="head")


def test_two_regions_of_one_key_are_refused() -> None:
    with pytest.raises(InvariantError, match="two regions have the key 'a'"):
        RegionMap((region(), region()))


def test_a_region_map_is_a_sequence_of_regions() -> None:
    both = RegionMap((region("a"), region("b")))
    assert (len(both), both.keys, [r.key for r in both]) == (2, ("a", "b"), ["a", "b"])


@pytest.mark.parametrize(
    ("miss", "text"),
    [
        (Rejected("why"), "why"),
        (Rejected("why", "add_1"), "add_1: why"),
        (Rejected("why", "add_1", "dit.py:7"), "add_1 (dit.py:7): why"),
        (Rejected("why", "", "dit.py:7"), "(dit.py:7): why"),
    ],
)
def test_a_miss_says_where_and_why(miss: Rejected, text: str) -> None:
    assert str(miss) == text


def test_an_empty_graph_has_no_regions() -> None:
    analysis = analyze_module(lambda x: x * 2, latent())
    assert isinstance(analysis.facts, Facts)
    assert (len(analysis.facts.regions), analysis.facts.regions.total_macs) == (0, 0)


def test_a_written_out_attention_is_a_region_too() -> None:
    core = lambda q, k, v: (q @ k.mT).softmax(-1) @ v  # noqa: E731
    assert named(timed(Block(mixer=Attention(core)))) == named(analyzed("plain"))
