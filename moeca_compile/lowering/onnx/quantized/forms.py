"""Products with quantized weights as operators of ONNX.

8 bits: DequantizeLinear and a Gemm, operators of ONNX itself. 4 bits: `com.microsoft.MatMulNBits`, which onnxruntime
and OpenVINO have. The choice is that of benchmarks/results/quantized_products.json. Weights of 4 bits that are read in
another way than by one product are stored in 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.errors import InvariantError
from moeca_compile.lowering.onnx.quantized.affine import Affine

_DOMAIN = "moeca"  # of operators that stand for one until the graph is written
_FLOAT = 1  # the accuracy level of MatMulNBits that computes in floating point throughout
_LEAST, _MOST, _PADDED = 16, 128, 32  # of a block in MatMulNBits; of one that is as long as a row


def nbits_block(affine: Affine) -> int:
    """The block that MatMulNBits can have for these weights, a power of two; 0: there is none."""
    block = affine.block
    power = min(block & -block, _MOST)
    if power >= _LEAST:
        return power
    return _PADDED if block == affine.integers.shape[1] else 0


def packed(affine: Affine) -> list[Tensor]:
    """Two integers a byte [N, B, block / 2], scales [N, B], and zero points [N, B / 2] where one isn't 0."""
    rows, width = affine.integers.shape
    block = nbits_block(affine)
    blocks = -(-width // block)
    values = F.pad(affine.integers, (0, blocks * block - width)).reshape(rows, blocks, block)
    repeats = blocks // affine.scale.shape[1]
    parts = [_pairs(values), affine.scale.repeat_interleave(repeats, 1)]
    if affine.zero.any():
        zero = affine.zero.repeat_interleave(repeats, 1)
        parts.append(_pairs(F.pad(zero, (0, blocks % 2))))
    return parts


def _pairs(values: Tensor) -> Tensor:
    """int8 [..., 2 n] from -8 to 7 -> uint8 [..., n], the first of two in the lower half."""
    raised = (values + 8).to(torch.uint8)
    return raised[..., ::2] | raised[..., 1::2] << 4


def rows_of(affine: Affine) -> list[Tensor]:
    """A row for each scale: int8 [N * B, block], scales [N * B], and zero points [N * B] where one isn't 0."""
    parts = [affine.integers.reshape(-1, affine.block), affine.scale.reshape(-1)]
    return [*parts, affine.zero.reshape(-1)] if affine.zero.any() else parts


def dequantized(parts: Sequence[Tensor], rows: int, width: int) -> Tensor:
    """What `rows_of` was made of, as floating-point numbers [N, K]."""
    values: Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear", list(parts), {"axis": 0}, dtype=parts[1].dtype, shape=parts[0].shape
    )
    return values if values.shape == (rows, width) else values.reshape(rows, width)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N], as a Gemm: it multiplies by a transposed weight as it lies."""
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def weight_4_bits(parts: Sequence[Tensor], rows: int, width: int) -> Tensor:
    """`packed` as a weight [N, K] that no runtime computes: `write_nbits` makes one operator of it and its product."""
    numbers: dict[str, Any] = {
        "N": rows,
        "K": width,
        "bits": 4,
        "block_size": 2 * parts[0].shape[2],
        "accuracy_level": _FLOAT,
    }
    result: Tensor = torch.onnx.ops.symbolic(
        f"{_DOMAIN}::Weight4", list(parts), numbers, dtype=parts[1].dtype, shape=(rows, width), version=1
    )
    return result


VALUES = (dequantized, weight_4_bits)  # large values of smaller constants: they aren't to be folded


def write_nbits(model: Any) -> None:
    """Products with weights of 4 bits in an onnx_ir.Model become MatMulNBits."""
    import onnx_ir as ir

    for weight in [node for node in model.graph if node.domain == _DOMAIN]:
        quantized, scales, zeros = (*weight.inputs, None)[:3]
        for gemm in [user for user, _ in weight.outputs[0].uses()]:
            if gemm.op_type != "Gemm" or gemm.inputs[1] is not weight.outputs[0]:
                raise InvariantError(f"{gemm.op_type} reads a weight of 4 bits, which only a Gemm multiplies by")
            x, bias = gemm.inputs[0], (*gemm.inputs, None)[2]
            given = [x, quantized, scales, zeros, None, bias]
            while given[-1] is None:
                given.pop()
            product = ir.node("MatMulNBits", given, dict(weight.attributes), domain="com.microsoft")
            ir.convenience.replace_nodes_and_values(model.graph, gemm, [gemm], [product], gemm.outputs, product.outputs)
        model.graph.remove(weight, safe=True)
        model.opset_imports.pop(_DOMAIN, None)
        model.opset_imports["com.microsoft"] = 1
