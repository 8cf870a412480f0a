"""`moeca::experts` in ONNX for runtimes on a CPU: each expert gathers its rows, found by NonZero, and scatters back.

The graph holds every expert, whichever the example inputs hit, and each runs on as many rows as it has at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from moeca_compile.errors import LoweringError


def segments(opset: int) -> Callable[..., Any]:
    """The translation for `torch.onnx.export`'s table, in ops of `opset`."""
    from onnxscript import onnx_opset

    op: Any = getattr(onnx_opset, f"opset{opset}")

    def moeca_experts(
        x: Any, idx: Any, up: Sequence[Any], down: Sequence[Any], gate: Sequence[Any], up_bias: Sequence[Any],
        down_bias: Sequence[Any], gate_bias: Sequence[Any], activation: str,
    ) -> Any:  # fmt: skip
        top_k, width = op.Constant(value_ints=[idx.shape[1]]), op.Constant(value_ints=[down[0].shape[0]])
        ids = op.Reshape(idx, op.Constant(value_ints=[-1]))
        shape = op.Concat(op.Shape(ids), width, axis=0)
        result = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), shape)
        for e in range(len(up)):
            branches = op.Transpose(op.NonZero(op.Equal(ids, op.Constant(value_int=e))), perm=[1, 0])  # [rows, 1]
            tokens = op.Div(op.Squeeze(branches, op.Constant(value_ints=[1])), top_k)
            rows = op.Gather(x, tokens, axis=0)
            h = _linear(op, rows, up, up_bias, e)
            if gate:
                h = op.Mul(_activate(op, _linear(op, rows, gate, gate_bias, e), activation), h)
            else:
                h = _activate(op, h, activation)
            result = op.ScatterND(result, branches, _linear(op, h, down, down_bias, e))
        return op.Reshape(result, op.Concat(op.Shape(idx), width, axis=0))

    return moeca_experts


def _linear(op: Any, x: Any, weights: Sequence[Any], biases: Sequence[Any], e: int) -> Any:
    return op.Gemm(x, weights[e], *(biases[e : e + 1] if biases else ()), transB=1)


def _activate(op: Any, h: Any, name: str) -> Any:
    def number(value: float) -> Any:
        return op.CastLike(op.Constant(value_float=value), h)

    def gelu_tanh() -> Any:
        cube = op.Mul(h, op.Mul(h, h))
        inner = op.Mul(op.Add(h, op.Mul(cube, number(0.044715))), number(math.sqrt(2 / math.pi)))
        return op.Mul(op.Mul(h, number(0.5)), op.Add(op.Tanh(inner), number(1.0)))

    forms: dict[str, Callable[[], Any]] = {
        "silu": lambda: op.Mul(h, op.Sigmoid(h)),
        "gelu": lambda: op.Mul(op.Mul(h, number(0.5)), op.Add(op.Erf(op.Div(h, number(math.sqrt(2)))), number(1.0))),
        "gelu_tanh": gelu_tanh,
        "quick_gelu": lambda: op.Mul(h, op.Sigmoid(op.Mul(h, number(1.702)))),
        "relu": lambda: op.Relu(h),
        "relu2": lambda: op.Mul(op.Relu(h), op.Relu(h)),
        "sigmoid": lambda: op.Sigmoid(h),
        "identity": lambda: h,
    }
    if name not in forms:
        raise LoweringError(f"moeca::experts: no ONNX form of the activation {name!r}; there are {sorted(forms)}")
    return forms[name]()
