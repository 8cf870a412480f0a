"""A graph in ONNX: names of its ends."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.onnx.lower import lower_onnx
from moeca_compile.pipeline import LOWER_ONNX
from moeca_compile.schedule import Action


def twice(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    doubled = x * 2
    return doubled, doubled, doubled + 1


def constants(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return weight, x + weight, weight, weight.exp()


def handed_through(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return x, x + weight, x


@pytest.mark.parametrize("function", [twice, constants, handed_through])
def test_every_output_has_its_own_name(
    function: Callable[..., tuple[Tensor, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    x, weight = torch.randn(3), torch.randn(3)
    gm = make_fx(function, tracing_mode="fake", pre_dispatch=True)(x, weight)
    node = next(node for node in gm.graph.nodes if node.op == "output")
    node.args = (tuple(node.args[0]),)
    variant = Variant("v0", (Action.COMPUTE,), gm, (), (), (), False, False, len(node.args[0]))
    first, second = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    outputs = [f"y{i}" for i in range(variant.outputs)]
    model, _ = lower_onnx([variant], (), {second: weight}, {first: "x"}, outputs, 20, passes=LOWER_ONNX)
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    for value, expected in zip(session.run(outputs, {"x": x.numpy()}), function(x, weight), strict=True):
        assert torch.allclose(torch.from_numpy(value), expected)
    assert caplog.records == []
