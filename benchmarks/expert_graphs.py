"""ONNX graphs of one layer of routed experts: the forms that an export writes, and others to compare with them.

Each takes x [T, D], idx [T, K] and gates [T, K] and gives y [T, D], the gate-weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.experts.choose import choose
from moeca_compile.lowering.onnx.lower import lower_onnx
from moeca_compile.ops import experts as _experts  # noqa: F401  (makes torch.ops.moeca.experts)
from moeca_compile.pipeline import LOWER_ONNX
from moeca_compile.schedule import Action

if TYPE_CHECKING:
    from benchmarks.expert_forms import Layer

EXPORTED = ("segments", "dense", "capacity:1.25", "capacity:2", "moe")
NEVER = -1e4  # the logarithm of no weight
SWIGLU = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}


@dataclass(frozen=True)
class Graphs:
    """A layer's graphs by form, inputs for all of them, and what they have to give."""

    files: dict[str, Path]
    feeds: dict[str, Any]
    expected: Any
    torch: Callable[[], Tensor]


def graphs_of(layer: Layer, folder: Path) -> Graphs:
    """Write all forms of a layer with SwiGLU experts and seeded random weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((layer.hidden, layer.width), (layer.width, layer.hidden), (layer.hidden, layer.width))
    weights = [
        torch.randn(*shape, generator=generator) * shape[1] ** -0.5 for shape in shapes for _ in range(layer.experts)
    ]
    x = torch.randn(layer.tokens, layer.width, generator=generator)
    idx = torch.rand(layer.tokens, layer.experts, generator=generator).topk(layer.top_k).indices
    gates = torch.rand(layer.tokens, layer.top_k, generator=generator)

    def call(x: Tensor, idx: Tensor, gates: Tensor, *flat: Tensor) -> tuple[Tensor]:
        up, down, gate = (list(flat[i * layer.experts : (i + 1) * layer.experts]) for i in range(3))
        y = torch.ops.moeca.experts(x, idx, up, down, gate, [], [], [], "silu")
        return ((y * gates[..., None]).sum(1),)

    files = {}
    for form in EXPORTED:
        files[form] = folder / f"{form.replace(':', '_')}.onnx"
        _export(call, (x, idx, gates), weights, form, files[form])
    up, down, gate = (torch.stack(weights[i * layer.experts : (i + 1) * layer.experts]).numpy() for i in range(3))
    for form, model in operator_forms(layer, up, down, gate).items():
        files[form] = folder / f"{form.replace(' ', '_')}.onnx"
        files[form].write_bytes(model.SerializeToString())
    run = torch.no_grad()(lambda: call(x, idx, gates, *weights)[0])
    feeds = {"x": x.numpy(), "idx": idx.numpy(), "gates": gates.numpy()}
    return Graphs(files, feeds, run().numpy(), run)


def _export(call: Any, inputs: tuple[Tensor, ...], weights: list[Tensor], form: str, path: Path) -> None:
    """Write a function of inputs and weights as an export writes a variant."""
    import onnx_ir as ir

    gm = make_fx(call, tracing_mode="fake", pre_dispatch=True)(*inputs, *weights)
    output = next(node for node in gm.graph.nodes if node.op == "output")
    output.args = (tuple(output.args[0]),)
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    variant = Variant("v0", (Action.COMPUTE,), gm, (), (), (), False, False, 1)
    named = dict(zip(names, ("x", "idx", "gates"), strict=False))
    bound = dict(zip(names[3:], weights, strict=True))
    model, _ = lower_onnx([variant], (), bound, named, ["y"], 20, choose(form, ("onnx",))[0], LOWER_ONNX)
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())


def quantized_graphs(layer: Layer, bits: int, folder: Path) -> tuple[dict[str, Path], dict[str, Any], Any]:
    """A layer over weights of `bits` bits with a scale a row: files by form, their inputs, and the right result.

    "float32" has the same weights, dequantized before.
    """
    rng = np.random.default_rng(0)
    shapes = ((layer.hidden, layer.width), (layer.width, layer.hidden), (layer.hidden, layer.width))
    stacks = [
        quantize(rng.standard_normal((layer.experts, *shape)).astype(np.float32) * shape[1] ** -0.5, bits)
        for shape in shapes
    ]
    signed = [_signed(values, bits) for values, _ in stacks]
    flat = [
        torch.from_numpy(part[e])
        for values, (_, scales) in zip(signed, stacks, strict=True)
        for e in range(layer.experts)
        for part in (values, scales)
    ]
    x = torch.from_numpy(rng.standard_normal((layer.tokens, layer.width)).astype(np.float32))
    idx = torch.from_numpy(rng.random((layer.tokens, layer.experts)).argsort(1)[:, : layer.top_k].copy())
    gates = torch.from_numpy(rng.random((layer.tokens, layer.top_k)).astype(np.float32))

    def call(x: Tensor, idx: Tensor, gates: Tensor, *flat: Tensor) -> tuple[Tensor]:
        if flat[0].dtype == torch.int8:
            flat = tuple(flat[i].to(gates.dtype) * flat[i + 1][:, None] for i in range(0, len(flat), 2))
        up, down, gate = (list(flat[i * layer.experts : (i + 1) * layer.experts]) for i in range(3))
        y = torch.ops.moeca.experts(x, idx, up, down, gate, [], [], [], "silu")
        return ((y * gates[..., None]).sum(1),)

    plain = [flat[i].float() * flat[i + 1][:, None] for i in range(0, len(flat), 2)]
    files = {form: folder / f"{form}_{bits}.onnx" for form in ("float32", "segments", "QMoE")}
    _export(call, (x, idx, gates), plain, "segments", files["float32"])
    _export(call, (x, idx, gates), flat, "segments", files["segments"])
    (up, up_scales), (down, down_scales), (gate, gate_scales) = stacks
    first = (np.stack([gate, up], axis=2).reshape(layer.experts, 2 * layer.hidden, -1),
             np.stack([gate_scales, up_scales], axis=2).reshape(layer.experts, -1))  # fmt: skip
    model = _quantized(layer, first, (down, down_scales), SWIGLU, bits)
    files["QMoE"].write_bytes(model.SerializeToString())
    exact = call(x.double(), idx, gates.double(), *(one.double() for one in plain))[0].numpy()
    return files, {"x": x.numpy(), "idx": idx.numpy(), "gates": gates.numpy()}, exact


def _signed(values: Any, bits: int) -> Any:
    """What `quantize` made as int8 around 0, one a byte."""
    if bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
    return (values.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def operator_forms(layer: Layer, up: Any, down: Any, gate: Any) -> Mapping[str, Any]:
    """onnxruntime's operators where they weight and sum by themselves; the second from weights of 8 and of 4 bits."""
    interleaved = np.stack([gate, up], axis=2).reshape(layer.experts, 2 * layer.hidden, layer.width)
    forms = {"moe of K": _of_k(layer, {"first": interleaved, "second": down}, SWIGLU)}
    for bits in (8, 4):
        parts = (quantize(interleaved, bits), quantize(down, bits))
        forms[f"qmoe of {bits} bits"] = _quantized(layer, *parts, SWIGLU, bits)
    return forms


def _of_k(layer: Layer, weights: Mapping[str, Any], attributes: Mapping[str, Any]) -> Any:
    """The operator routes by the softmax of logits: of the gates' logarithms, whose softmax is the gates over their
    sum."""
    from onnx import helper

    nodes = [
        helper.make_node("Log", ["gates"], ["log_gates"]),
        *_scattered("log_gates", NEVER, "logits"),
        helper.make_node(
            "MoE", ["x", "logits", "first", "", "second"], ["mean"], domain="com.microsoft", k=layer.top_k, **attributes
        ),
        helper.make_node("ReduceSum", ["gates", "last"], ["total"], keepdims=1),
        helper.make_node("Mul", ["mean", "total"], ["y"]),
    ]
    return _model(layer, nodes, weights)


def _quantized(layer: Layer, first: Any, second: Any, attributes: Mapping[str, Any], bits: int) -> Any:
    """The operator chooses by one input and weights by another; weights as `quantize` makes them."""
    from onnx import helper

    constants: dict[str, Any] = {}
    for name, parts in (("first", first), ("second", second)):
        constants[name], constants[f"{name}_scales"] = parts
    node = helper.make_node(
        "QMoE",
        ["x", "logits", "first", "first_scales", "", "second", "second_scales", *[""] * 7, "routing"],
        ["y"],
        domain="com.microsoft",
        k=layer.top_k,
        expert_weight_bits=bits,
        **attributes,
    )
    nodes = [*_scattered("gates", NEVER, "logits"), *_scattered("gates", 0.0, "routing"), node]
    return _model(layer, nodes, constants)


def quantize(weight: Any, bits: int) -> tuple[Any, Any]:
    """Symmetric, a scale a row: [E, O, I] -> uint8 [E, O, I * bits / 8] around half of the range, and scales [E, O]."""
    half = 1 << (bits - 1)
    scales = abs(weight).max(-1) / (half - 1)
    values = (np.rint(weight / scales[..., None]) + half).clip(0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        values = values[..., ::2] | values[..., 1::2] << 4
    return values, scales.astype(np.float32)


def _scattered(values: str, elsewhere: float, name: str) -> list[Any]:
    """`values` [T, K] in the places of their experts among E, `elsewhere` in the others."""
    from onnx import helper

    fill = helper.make_tensor("fill", 1, [1], [elsewhere])
    return [
        helper.make_node("ConstantOfShape", ["sizes"], [f"{name}_empty"], value=fill),
        helper.make_node("ScatterElements", [f"{name}_empty", "idx", values], [name], axis=1),
    ]


def _model(layer: Layer, nodes: list[Any], constants: Mapping[str, Any]) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    sizes = {"sizes": np.array([layer.tokens, layer.experts], np.int64), "last": np.array([1], np.int64)}
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [layer.tokens, layer.width]),
        helper.make_tensor_value_info("idx", TensorProto.INT64, [layer.tokens, layer.top_k]),
        helper.make_tensor_value_info("gates", TensorProto.FLOAT, [layer.tokens, layer.top_k]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [layer.tokens, layer.width])
    initializers = [numpy_helper.from_array(value, name) for name, value in (dict(constants) | sizes).items()]
    graph = helper.make_graph(nodes, "layer", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
