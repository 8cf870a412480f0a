"""Operators that TensorRT doesn't take, named before anything is built."""

from __future__ import annotations

from typing import Any

from moeca_compile.errors import LoweringError
from moeca_compile.runtime.bundle.graphs import graph_of, nodes_of

# as measured with TensorRT-RTX 1.7.1.116, which says of both that it supports them
REFUSED = {
    "NonZero": "how many values it gives depends on data; export with 'tensorrt' among the targets",
    "Attention": "it builds for some types and shapes only; export with opset 20",
}
_DOUBLE = 11  # onnx.TensorProto.DOUBLE


def operators_of(graph: bytes) -> dict[str, str]:
    """The operators in an ONNX file, with the name of the first node of each; those of other domains with theirs."""
    operators: dict[str, str] = {}
    for node in nodes_of(graph_of(graph)):
        operators.setdefault(f"{node.domain}.{node.op_type}" if node.domain else node.op_type, node.name)
    return operators


def refuse_unsupported(graph: bytes, file: str) -> None:
    """Raises:
    LoweringError: the graph has an operator or a data type that TensorRT doesn't take; it says which and where.
    """
    wrong = []
    for operator, node in operators_of(graph).items():
        if "." in operator:
            wrong.append(f"{operator} (node {node}): no operator of ONNX itself, and there is no plugin for it")
        elif operator in REFUSED:
            wrong.append(f"{operator} (node {node}): {REFUSED[operator]}")
    if reduced := _reducing(graph_of(graph)):
        wrong.append(
            f"ScatterElements that reduces (node {reduced}): it has no such form. A Control's thresholds need it: "
            "export a schedule without them"
        )
    if doubles := _doubles(graph_of(graph)):
        wrong.append(f"float64 ({doubles[0]}): TensorRT has no such type; export the model in float32")
    if wrong:
        raise LoweringError(f"{file} can't become an engine of TensorRT: {'; '.join(wrong)}")


def _reducing(graph: Any) -> str | None:
    """The first ScatterElements that adds up, or reduces otherwise."""
    for node in nodes_of(graph):
        if node.op_type == "ScatterElements" and any(
            attribute.name == "reduction" and attribute.s != b"none" for attribute in node.attribute
        ):
            return str(node.name)
    return None


def _doubles(graph: Any) -> list[str]:
    values = [value for value in (*graph.input, *graph.output) if value.type.tensor_type.elem_type == _DOUBLE]
    return [value.name for value in (*values, *(tensor for tensor in graph.initializer if tensor.data_type == _DOUBLE))]
