"""A graph by hand that takes and gives its state: what a bundle's one-file graph looks like from outside."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper


def one_file(batch: str | int = "batch", states: int = 2) -> bytes:
    """y = x + the mean of all states; each state takes x. A step counter too."""
    sizes = [batch, 3]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes)]
    nodes: list[Any] = []
    for i in range(states):
        inputs.append(helper.make_tensor_value_info(f"state_{i:03d}_in", TensorProto.FLOAT, sizes))
        outputs.append(helper.make_tensor_value_info(f"state_{i:03d}_out", TensorProto.FLOAT, sizes))
        nodes.append(helper.make_node("Identity", ["x"], [f"state_{i:03d}_out"]))
    inputs.append(helper.make_tensor_value_info("step_in", TensorProto.INT64, [1]))
    outputs.append(helper.make_tensor_value_info("step_out", TensorProto.INT64, [1]))
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    nodes.append(helper.make_node("Add", ["step_in", "one"], ["step_out"]))
    nodes.append(helper.make_node("Mean", ["x", *(f"state_{i:03d}_in" for i in range(states))], ["y"]))
    graph = helper.make_graph(nodes, "fused", inputs, outputs, [one])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made)
    return made.SerializeToString()
