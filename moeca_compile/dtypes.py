"""The dtypes that tensors may have, and what each system calls them. No torch."""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """What other systems call a dtype; empty: they don't have it. onnxruntime has ONNX's names in lower case."""

    onnx: str
    openvino: str
    triton: str
    tensorrt: str


DTYPES = {
    "float64": Names("DOUBLE", "f64", "TYPE_FP64", ""),
    "float32": Names("FLOAT", "f32", "TYPE_FP32", "FLOAT"),
    "float16": Names("FLOAT16", "f16", "TYPE_FP16", "HALF"),
    "bfloat16": Names("BFLOAT16", "bf16", "TYPE_BF16", "BF16"),
    "int64": Names("INT64", "i64", "TYPE_INT64", "INT64"),
    "int32": Names("INT32", "i32", "TYPE_INT32", "INT32"),
    "int16": Names("INT16", "i16", "TYPE_INT16", ""),
    "int8": Names("INT8", "i8", "TYPE_INT8", "INT8"),
    "uint8": Names("UINT8", "u8", "TYPE_UINT8", "UINT8"),
    "bool": Names("BOOL", "boolean", "TYPE_BOOL", "BOOL"),
}
OF_ONNXRUNTIME = {names.onnx.lower(): dtype for dtype, names in DTYPES.items()}
OF_OPENVINO = {names.openvino: dtype for dtype, names in DTYPES.items()}
OF_TENSORRT = {names.tensorrt: dtype for dtype, names in DTYPES.items() if names.tensorrt}


def name_of(dtype: object) -> str:
    """The name of a torch dtype: `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
