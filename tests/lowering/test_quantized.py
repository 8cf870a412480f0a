"""Quantized weights on the way to ONNX: their scales are found by trying, and products with them are those of torch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.experts.choose import Lowering, choose
from moeca_compile.lowering.onnx.lower import SEGMENTS, lower_onnx
from moeca_compile.lowering.onnx.quantized import forms
from moeca_compile.lowering.onnx.quantized.affine import affine_of
from moeca_compile.lowering.onnx.quantized.keep import WIDENED
from moeca_compile.lowering.onnx.request import OnnxRequest
from moeca_compile.passes.manager import PassManager
from moeca_compile.pipeline import LOWER_ONNX
from moeca_compile.schedule import Action
from tests.graphs import graph_of

ROWS, TOKENS = 6, 5


def quantized(width: int, block: int, bits: int = 8, zeros: bool = False, seed: int = 0) -> tuple[Tensor, ...]:
    """Integers [N, K], scales and zero points [N, K / block]."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    integers = torch.randint(-half, half, (ROWS, width), generator=generator).to(torch.int8)
    integers[0, :2] = torch.tensor([-half, half - 1])
    scales = torch.rand(ROWS, width // block, generator=generator) + 0.1
    zero = torch.randint(-3, 4, scales.shape, generator=generator) if zeros else torch.zeros_like(scales)
    return integers, scales, zero.to(torch.int8)


def values(integers: Tensor, scales: Tensor, zero: Tensor) -> Tensor:
    """As a library may compute them: in blocks."""
    blocks = integers.reshape(*scales.shape, -1).to(torch.float32)
    return ((blocks - zero[..., None].to(torch.float32)) * scales[..., None]).reshape(integers.shape)


@pytest.mark.parametrize(
    ("width", "block", "bits", "zeros"), [(32, 32, 8, False), (32, 16, 8, True), (24, 8, 4, True), (6, 6, 8, False)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_scales_and_zero_points_are_found(width: int, block: int, bits: int, zeros: bool, turned: bool) -> None:
    integers, scales, zero = quantized(width, block, bits, zeros)
    stored = integers.t().contiguous() if turned else integers

    def made(given: Tensor) -> Tensor:
        return values(given.t() if turned else given, scales, zero)

    for is_transposed in (False, True):
        found = affine_of((lambda given: made(given).t()) if is_transposed else made, stored, is_transposed)
        assert found is not None
        assert (found.block, found.bits) == (block, bits)
        for part, wanted in zip((found.integers, found.scale, found.zero), (integers, scales, zero), strict=True):
            assert torch.equal(part, wanted)


def test_unsigned_integers_are_shifted() -> None:
    integers, scales, zero = quantized(32, 16, 4, zeros=True)
    found = affine_of(
        lambda given: values(given.to(torch.int16) - 8, scales, zero), (integers + 8).to(torch.uint8), False
    )
    assert found is not None
    assert torch.equal(found.integers, integers)
    assert torch.equal(found.zero, zero)


@pytest.mark.parametrize(
    "made",
    [
        lambda q: q.to(torch.float32) ** 2,
        lambda q: torch.linspace(-1, 1, 256)[q.long() + 128] ** 3,  # a table, as of NF4
        lambda q: (q.to(torch.float32) - 0.5) * 0.1,  # a zero point between two integers
        lambda q: q.to(torch.float32).cumsum(1),
        lambda q: q,
        lambda q: q.to(torch.float32)[:, :8],
    ],
)
def test_other_values_have_no_scales(made: Callable[[Tensor], Tensor]) -> None:
    assert affine_of(made, quantized(16, 16)[0], False) is None


def lowered(
    call: Callable[..., Any], x: Tensor, weights: tuple[Tensor, ...], results: int = 1
) -> Any:  # fmt: skip
    """The onnx_ir.Model of a function of x and weights, at two, three and seven rows."""
    variants = []
    for rows in (2, 3, 7):
        gm = graph_of(call, x[:1].expand(rows, *x.shape[1:]).clone(), *weights)
        variants.append(Variant("v0", (Action.COMPUTE,), gm, (), (), (), False, False, results))
    names = [node.name for node in variants[0].gm.graph.nodes if node.op == "placeholder"]
    bound = dict(zip(names[1:], weights, strict=True))
    outputs = [f"y{i}" for i in range(results)]
    return lower_onnx(variants, (2, 3, 7), bound, {names[0]: "x"}, outputs, 20, SEGMENTS, LOWER_ONNX)[0]


def run(model: Any, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(result) for result in session.run(None, {"x": x.numpy()})]


def kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


LINEARS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, q, s, z, bias: F.linear(x, values(q, s, z), bias),
    "mm, scaled after": lambda x, q, s, z, bias: torch.mm(x, q.t().to(torch.float32)) * s[:, 0] + bias,
    "addmm": lambda x, q, s, z, bias: torch.addmm(bias, x, values(q, s, z).t()),
}
PRODUCTS = [  # how it is written, width, block, bits, zero points
    ("linear", 48, 48, 8, True),
    ("linear", 64, 32, 4, True),
    ("mm, scaled after", 40, 40, 8, False),
    ("mm, scaled after", 24, 24, 4, False),
    ("addmm", 96, 32, 4, True),
    ("addmm", 24, 8, 4, True),  # MatMulNBits has blocks of 16 and more
]


def products() -> tuple[Callable[..., tuple[Tensor, ...]], Tensor, tuple[Tensor, ...]]:
    """A function with all of `PRODUCTS` of the first channels of x, and its weights."""
    weights = [quantized(width, block, bits, zeros) for _, width, block, bits, zeros in PRODUCTS]
    bias = torch.linspace(-1, 1, ROWS)

    def call(x: Tensor, bias: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            LINEARS[form](x[..., :width].relu(), *flat[3 * i : 3 * i + 3], bias)
            for i, (form, width, *_) in enumerate(PRODUCTS)
        )

    x = torch.randn(TOKENS, 96, generator=torch.Generator().manual_seed(2))
    return call, x, (bias, *itertools.chain(*weights))


def kept(call: Callable[..., Any], x: Tensor, weights: tuple[Tensor, ...], experts: Lowering = SEGMENTS) -> GraphModule:
    """What becomes of a graph before it is written in ONNX."""
    gm = graph_of(call, x, *weights)
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    request = OnnxRequest((gm,), (len(x),), dict(zip(names[1:], weights, strict=True)), experts)
    return PassManager().rewrite(LOWER_ONNX, gm, request)


def readers(gm: GraphModule) -> Counter[Any]:
    return Counter(node.target for node in gm.graph.nodes if node.op == "call_function")


def test_what_products_read() -> None:
    gm = kept(*products())
    assert readers(gm)[forms.weight_4_bits] == readers(gm)[forms.dequantized] == 3
    assert not readers(gm)[torch.ops.aten.mul.Tensor]  # a scale after the product is in the weights' scales
    sizes = {tensor.nbytes for tensor in gm.buffers() if tensor.dtype in (torch.int8, torch.uint8)}
    assert {ROWS * 48, ROWS * 64 // 2, ROWS * 40, ROWS * 32 // 2, ROWS * 96 // 2, ROWS * 24} <= sizes
    assert max(tensor.nbytes for tensor in gm.buffers()) == 4 * ROWS * 24  # no weight is there in floating point


@pytest.mark.parametrize("targets", [("onnx", "openvino"), ("cuda",), ("onnx", "tensorrt")])
def test_what_experts_read(targets: tuple[str, ...]) -> None:
    call, weights = experts_of(16, 4)
    chosen, _ = choose("auto", targets, "channels")
    found = readers(kept(call, torch.ones(TOKENS, 32), weights, chosen))
    has_operator = "cuda" not in targets and "tensorrt" not in targets
    assert found[forms.weight_4_bits] == 2 * has_operator
    assert found[forms.dequantized] == 2 * (not has_operator)


@pytest.mark.slow
def test_products() -> None:
    call, x, weights = products()
    model = lowered(call, x, weights, len(PRODUCTS))
    for result, expected in zip(run(model, x), call(x, *weights), strict=True):
        assert (result - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert kinds(model)["MatMulNBits"] == kinds(model)["DequantizeLinear"] == 3


def experts_of(block: int, bits: int) -> tuple[Callable[..., tuple[Tensor]], tuple[Tensor, ...]]:
    """Two experts of one layer, 1 of 2, from 32 channels to 32 with 6 hidden ones: `up` is quantized."""
    up = [quantized(32, block, bits, seed=e) for e in range(2)]
    down = [torch.randn(32, ROWS, generator=torch.Generator().manual_seed(e)) for e in range(2)]

    def call(x: Tensor, *flat: Tensor) -> tuple[Tensor]:
        ups = [values(*flat[3 * e : 3 * e + 3]) for e in range(2)]
        idx = (x[:, :1] > 0).long()
        return (torch.ops.moeca.experts(x, idx, ups, list(flat[6:]), [], [], [], [], "silu").sum(1),)

    return call, (*itertools.chain(*up), *down)


@pytest.mark.slow
def test_experts() -> None:
    call, weights = experts_of(16, 4)
    x = torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(3))
    model = lowered(call, x, weights)
    assert kinds(model)["MatMulNBits"] == 2
    assert "moeca" not in model.opset_imports
    expected = call(x, *weights)[0]
    assert (run(model, x)[0] - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_what_is_no_scale_times_integers_is_noted() -> None:
    integers = quantized(64, 64)[0]
    gm = kept(lambda x, q: F.linear(x, q.to(torch.float32) ** 2), torch.ones(2, 64), (integers,))
    assert len(gm.meta[WIDENED]) == 1
    assert max(buffer.nbytes for buffer in gm.buffers()) == 4 * integers.numel()


def test_blocks_of_one_scale_are_the_longest() -> None:
    integers = torch.arange(-16, 16).reshape(2, 16).to(torch.int8)
    found = affine_of(lambda q: q.to(torch.float32) * 0.5, integers, False)
    assert found is not None
    assert (found.block, found.bits) == (16, 8)
