"""What a row skips is really gone: its operators, its weights, its random draws; what has an effect stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.passes.facts import Facts, RewriteRequest
from moeca_compile.passes.transform.drop_dead import drop_dead
from tests.passes.blocks import Block, Mlp, Timed, latent, routed, times, two_streams
from tests.tools import analyze_module, ops, variant_of


def weights(gm: GraphModule) -> set[str]:
    return {n.name for n in fx.placeholders(gm) if n.name.endswith(("weight", "bias")) or "_up_" in n.name}


def test_a_reused_region_takes_its_operators_along() -> None:
    full, none = (ops(variant_of(routed(), text).gm) for text in ("CCCC", "RRRR"))
    assert full["moeca.experts.default"] == full["aten.scaled_dot_product_attention.default"] == 2
    gone = ("moeca.experts.default", "aten.scaled_dot_product_attention.default", "aten.topk.default")
    assert [none[name] for name in gone] == [0, 0, 0]
    assert none["aten.layer_norm.default"] == 0


def test_each_region_takes_only_its_own() -> None:
    count = ops(variant_of(routed(), "CRRC").gm)
    assert count["moeca.experts.default"] == count["aten.scaled_dot_product_attention.default"] == 1


def test_a_region_s_weights_are_no_longer_inputs_and_the_gates_still_are() -> None:
    full, none = (weights(variant_of(routed(), text).gm) for text in ("CCCC", "FFFF"))
    left = {"time_weight", "time_bias", "body_blocks_0_ada_weight", "body_blocks_0_ada_bias"}
    assert none == left | {name.replace("_0_", "_1_") for name in left}
    assert full >= none | {"body_blocks_0_attn_qkv_weight", "body_blocks_1_mlp_router_weight", "body_blocks_0_mlp_up_2"}


def test_a_region_of_two_outputs_goes_whole() -> None:
    count = ops(variant_of(two_streams(), "FCC").gm)
    assert count["aten.scaled_dot_product_attention.default"] == 0
    assert count["aten.linear.default"] == ops(variant_of(two_streams(), "CCC").gm)["aten.linear.default"] - 4


def test_a_dead_random_draw_goes() -> None:
    """FX keeps dead nodes that may draw random numbers; a skipped region must not go on drawing."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.mlp(x) + torch.randn_like(x), 0.5, training=True)
            return F.scaled_dot_product_attention(h, h, h, dropout_p=0.3)

    analysis = analyze_module(Timed(Block(mlp=Noisy())), latent(), times())
    assert {"aten.dropout.default", "aten.randn_like.default"} <= set(ops(variant_of(analysis, "CC").gm))
    left = ops(variant_of(analysis, "CF").gm)
    assert not {"aten.dropout.default", "aten.randn_like.default"} & set(left)


def test_what_has_an_effect_stays() -> None:
    graph = Graph()
    x, unread = graph.placeholder("x"), graph.placeholder("unread")
    graph.call_function(aten.add_.Tensor, (x, 1))
    dead = graph.call_function(aten.sin.default, (x,))
    graph.call_function(aten.cos.default, (dead,))
    graph.output((x,))
    gm = drop_dead(GraphModule({}, graph), RewriteRequest(Facts(())))
    assert ops(gm) == {"aten.add_.Tensor": 1}
    assert fx.placeholders(gm) == [x]
    assert unread.name not in {n.name for n in gm.graph.nodes}


def test_a_full_row_loses_nothing() -> None:
    full = ops(variant_of(routed(), "CCCC", order=0).gm)
    assert full == ops(routed().gm)
