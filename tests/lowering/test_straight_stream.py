"""Equal blocks read a stream whose channels lie side by side, whatever order the embedding gave it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile.graph import fx
from moeca_compile.lowering.inductor.repeat_blocks import repeat_blocks
from moeca_compile.lowering.inductor.straight_stream import copy_into_order, straight_stream
from tests.graphs import assert_unchanged
from tests.lowering.test_repeat_blocks import arguments, calls, lowered, plain_analysis, variant_of
from tests.tools import ops

X, WEIGHT = torch.arange(24.0).reshape(2, 3, 4), torch.arange(12.0).reshape(4, 3)


def traced(call: object, *args: Tensor) -> GraphModule:
    gm = make_fx(call, tracing_mode="fake")(*args)
    assert isinstance(gm, GraphModule)
    return gm


def straight(gm: GraphModule, *names: str) -> Counter[str]:
    """The operators after straightening, `names` being what crosses a border."""
    copy_into_order(gm, fx.resolve(gm, names))
    gm.graph.lint()
    gm.recompile()
    return ops(gm)


def strides(gm: GraphModule) -> dict[str, tuple[int, ...]]:
    return {node.name: fx.need(node).stride() for node in gm.graph.nodes if fx.tensor(node) is not None}


def test_a_stream_out_of_order_is_copied_once_and_stays_in_order() -> None:
    gm = traced(lambda x: torch.tanh(x).transpose(1, 2).sin() * 2, X)
    wanted = gm(X)
    assert strides(gm)["sin"] == (12, 1, 4)
    assert straight(gm, "transpose", "sin", "mul")["aten.clone.default"] == 1
    assert all(one in ((12, 4, 1), (12, 3, 1)) for name, one in strides(gm).items() if name != "transpose")
    assert torch.equal(gm(X), wanted)
    assert gm(X).is_contiguous()


def test_what_crosses_no_border_stays_as_it_is() -> None:
    gm = traced(lambda x: torch.tanh(x).transpose(1, 2).sin(), X)
    assert not straight(gm)["aten.clone.default"]


def test_weights_are_read_as_they_lie() -> None:
    gm = traced(lambda weight: weight.t().sin(), WEIGHT)
    assert not straight(gm, "t")["aten.clone.default"]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.tanh(x).sin(),  # in order
        lambda x: torch.tanh(x)[:, :1].expand(2, 3, 4).sin(),  # the same elements several times
        lambda x: torch.tanh(x).long().transpose(1, 2).abs(),  # not a stream of channels
    ],
)
def test_nothing_else_is_copied(call: object) -> None:
    gm = traced(call, X)
    names = [node.name for node in gm.graph.nodes if node.op == "call_function"]
    assert not straight(gm, *names)["aten.clone.default"]


@pytest.mark.slow
def test_equal_blocks_get_a_stream_in_order_and_compute_the_same() -> None:
    whole, repeated = lowered(variant_of(plain_analysis(), "C" * 10))
    assert calls(repeated) == 5
    (body,) = (module for name, module in repeated.named_children() if name.startswith("body_"))
    assert isinstance(body, GraphModule)
    assert all(fx.need(node).is_contiguous() for node in fx.placeholders(body))
    assert not all(fx.need(node).is_contiguous() for node in whole.graph.nodes if "add" in node.name)
    given = arguments(whole)
    for one, other in zip(repeated(*given), whole(*given), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_a_graph_without_bodies_is_left_alone() -> None:
    gm = traced(lambda x: nn.functional.silu(torch.tanh(x).transpose(1, 2)), X)
    variant = variant_of(plain_analysis(), "C" * 10)
    assert_unchanged(straight_stream, gm, variant)
    assert_unchanged(repeat_blocks, gm, variant)
