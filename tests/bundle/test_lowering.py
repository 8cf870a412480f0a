"""What a graph goes through before it is ONNX: one for every batch, constants folded, squeezes that ONNX refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from moeca_compile.errors import InvariantError, LoweringError
from moeca_compile.graph import fx
from moeca_compile.lowering.onnx.batch import any_batch, dims
from moeca_compile.lowering.onnx.complex_pairs import without_complex
from moeca_compile.lowering.onnx.lower import SEGMENTS
from moeca_compile.lowering.onnx.request import OnnxRequest
from moeca_compile.lowering.onnx.small_forms import drop_squeezes, spread_masks
from moeca_compile.passes.manager import PassManager
from moeca_compile.pipeline import LOWER_ONNX
from tests.graphs import assert_becomes, assert_unchanged, graph_of

aten = torch.ops.aten


def lowered(gm: GraphModule, weights: Mapping[str, Tensor] | None = None) -> GraphModule:
    """What the passes of the page make of a graph for one batch."""
    return PassManager().rewrite(LOWER_ONNX, gm, OnnxRequest((gm,), (2,), weights or {}, SEGMENTS))


def at_three(function: Callable[[Tensor], Tensor]) -> GraphModule:
    graphs = tuple(graph_of(function, torch.zeros(batch, 4, 6)) for batch in (2, 3, 7))
    return PassManager().rewrite((any_batch,), graphs[0], OnnxRequest(graphs, (2, 3, 7), {}, SEGMENTS))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(x.shape[0] * 4, 6) * 2,
        lambda x: torch.cat([x, x.new_ones(1, 4, 6)]).view(x.shape[0] + 1, 24),
        lambda x: x[: x.shape[0] - 1].sum(0).expand(3 * x.shape[0], 4, 6),
        lambda x: x / x.shape[0],
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_sizes_follow_the_batch(function: Callable[[Tensor], Tensor], batch: int) -> None:
    x = torch.randn(batch, 4, 6)
    assert torch.equal(at_three(function)(x)[0], function(x))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: x.sum() * x.shape[0] ** 2, "4 at batch 2, 9 at batch 3, 49 at batch 7"),
        (lambda x: x * (1 / x.shape[0]), "0.5 at batch 2, 0.33"),
        (lambda x: torch.cat(list(x.unbind(0))), "loops over it"),
        (lambda x: x.relu() if x.shape[0] == 2 else x.sigmoid(), "branches on its batch"),
    ],
)
def test_what_does_not_is_refused(function: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(LoweringError, match=says) as caught:
        at_three(function)
    assert "dynamic_batch=False" in str(caught.value)


def test_shapes_at_several_batches() -> None:
    assert dims([(2, 32, 7, 3), (3, 48, 7, 4), (7, 112, 7, 8)], (2, 3, 7)) == ("batch", "16*batch", 7, "batch+1")
    assert dims([(2, 32)], (2, 3, 7)) == (2, 32)
    with pytest.raises(LoweringError, match="the number of dimensions depends on the batch"):
        dims([(2,), (3, 1), (7,)], (2, 3, 7))
    with pytest.raises(InvariantError, match="2 captures don't show"):
        dims([(2,), (3,)], (2, 3))


@pytest.mark.parametrize(
    "size",
    [
        lambda b: b * (b + 1) // 2,
        lambda b: b * b,
        lambda b: b * (b - 1),
        lambda b: 2**b,
        lambda b: max(b, 3),
        lambda b: -(-b // 2),
        lambda b: b + b // 3,
        lambda b: 8 - b,
    ],
)
def test_a_size_that_is_not_linear_in_the_batch_is_refused(size: Callable[[int], int]) -> None:
    with pytest.raises(LoweringError, match=r"at batch 2, .* at batch 7, which is no a \* batch \+ b"):
        dims([(size(batch),) for batch in (2, 3, 7)], (2, 3, 7))


def test_weights_are_folded_and_transposed_once() -> None:
    """A layer with a stacked weight that it splits, as in attention: two linears over its parts."""
    weight, bias = torch.randn(8, 6), torch.randn(4)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        first, second = weight.split(4)
        return aten.linear(x, first, bias) + aten.linear(x, second) + aten.linear(x, first)

    x = torch.randn(2, 5, 6)
    gm = graph_of(function, x, weight, bias)
    _, w, b = fx.placeholders(gm)
    gm = lowered(gm, {w.name: weight, b.name: bias})
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert targets.count(aten.matmul.default) == 3
    assert not {aten.linear.default, aten.t.default, aten.split.Tensor} & set(targets)
    assert [tuple(one.shape) for one in gm.buffers() if one.dim() == 2].count((6, 4)) == 2
    torch.testing.assert_close(gm(x)[0], function(x, weight, bias))


def rotary(x: Tensor, freqs: Tensor, places: Tensor) -> Tensor:
    """As models write it: pairs of channels are complex numbers, turned by constants that are."""
    first, second = freqs[:4].split(3, dim=-1)
    table = torch.cat([first.view(1, 2, 2, -1).expand(1, 2, 2, -1).reshape(4, -1), second], dim=-1)
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * table.unsqueeze(0).unsqueeze(-2)
    turned = turned * freqs[places].select(0, 1) * 0.5 * x[..., :5].abs()
    return torch.view_as_real(torch.cat([turned, turned[..., -2:]], -1).clone()).flatten(-2)


def test_complex_numbers_become_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 10, generator=generator)
    freqs = torch.polar(torch.ones(8, 5), torch.randn(8, 5, generator=generator))
    places = torch.tensor([1, 3])
    gm = graph_of(rotary, x, freqs, places)
    gm = lowered(gm, {fx.placeholders(gm)[1].name: freqs})
    assert not [
        node for node in gm.graph.nodes if node.target in (aten.view_as_complex.default, aten.view_as_real.default)
    ]
    assert not any(one.is_complex() for one in gm.buffers() if one is getattr(gm, "freqs_real", None))
    torch.testing.assert_close(gm(x, places)[0], rotary(x, freqs, places))


def test_complex_operators_without_a_form_are_named() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.view_as_complex(x).angle()

    gm = graph_of(function, torch.zeros(3, 2))
    with pytest.raises(LoweringError, match=r"aten.angle.* on complex numbers has no ONNX form"):
        lowered(gm)


def test_a_graph_without_complex_numbers_stays() -> None:
    gm = graph_of(lambda x: x * 2, torch.zeros(3))
    assert_unchanged(without_complex, gm, OnnxRequest((gm,), (2,), {}, SEGMENTS))


def test_what_grows_is_not_folded() -> None:
    bias = torch.randn(1, 1, 6)
    gm = graph_of(lambda x, bias: x + bias.expand(500, 50, 6), torch.zeros(500, 50, 6), bias)
    gm = lowered(gm, {fx.placeholders(gm)[1].name: bias})
    assert max(one.numel() for one in gm.buffers()) == 6


def test_squeezes_of_what_is_no_one() -> None:
    def function(x: Tensor) -> Tensor:
        return aten.squeeze.dims(aten.squeeze.dim(aten.squeeze.dim(x, 1), 0), [0, 1, 2])

    def legal(x: Tensor) -> Tensor:
        return aten.squeeze.dims(aten.squeeze.dim(x, 0), [1])

    request = OnnxRequest((), (2,), {}, SEGMENTS)
    assert_becomes(drop_squeezes, request, function, legal, torch.randn(1, 4, 1, 6))


def attend(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return aten.scaled_dot_product_attention(q, k, k, mask)


@pytest.mark.parametrize("sizes", [(2, 1, 1, 6), (1, 6), (2, 3, 4, 1), (2, 1, 1, 1)])
def test_a_mask_has_an_entry_for_each_query_and_key(sizes: tuple[int, ...]) -> None:
    def spread(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return attend(q, k, mask.expand(*[-1] * (mask.dim() - 2), 4, 6))

    q, k, mask = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.rand(sizes) < 0.7
    gm = graph_of(attend, q, k, mask)
    request = OnnxRequest((gm,), (2,), {}, SEGMENTS, opset=23)
    assert_unchanged(spread_masks, gm, replace(request, opset=20))
    assert_becomes(spread_masks, request, attend, spread, q, k, mask)


@pytest.mark.parametrize("sizes", [(2, 3, 4, 6), (4, 6)])
def test_a_mask_that_has_them_stays(sizes: tuple[int, ...]) -> None:
    gm = graph_of(attend, torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.rand(sizes))
    assert_unchanged(spread_masks, gm, OnnxRequest((gm,), (2,), {}, SEGMENTS, opset=23))


def test_what_draws_random_numbers_is_not_folded() -> None:
    bias = torch.randn(6)
    gm = graph_of(lambda x, bias: x + torch.rand_like(bias), torch.zeros(6), bias)
    gm = lowered(gm, {fx.placeholders(gm)[1].name: bias})
    assert not torch.equal(gm(torch.zeros(6))[0], gm(torch.zeros(6))[0])
