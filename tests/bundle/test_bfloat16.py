"""bfloat16 through numpy: rounding as torch's, and values that go through onnxruntime as bits."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto, helper

from moeca_compile.runtime.bundle.bfloat16 import from_stored, rounded, stored_dtype, to_stored
from moeca_compile.runtime.bundle.manifest import TensorSpec
from moeca_compile.runtime.providers.onnxruntime import CPU, OrtRuntime, bound_run


def test_rounding_is_torchs() -> None:
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-40, 1.00390625, 1.01171875], np.float32)
    values = np.concatenate([np.random.default_rng(0).standard_normal(10_000, np.float32), special])
    wanted = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_stored(rounded(values), "bfloat16"), wanted)


def test_what_is_not_bfloat16_stays() -> None:
    array = np.arange(3, dtype=np.float16)
    assert to_stored(array) is array
    assert from_stored(array, "float16") is array
    assert stored_dtype("bfloat16") == np.uint16
    assert stored_dtype("int64") == np.int64


def test_bits_go_through_onnxruntime() -> None:
    kind = TensorProto.BFLOAT16
    values = [helper.make_tensor_value_info(name, kind, ["n", 3]) for name in ("x", "s_in", "y", "s_out")]
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["s_in"], ["s_out"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:2], values[2:]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    runtime = OrtRuntime(CPU, threads=1)
    session = runtime.library.InferenceSession(model.SerializeToString(), providers=[CPU])
    spec = TensorSpec("x", "bfloat16", ("batch", 3))
    x = rounded(np.random.default_rng(0).standard_normal((2, 3), np.float32))
    takes, gives = {"x": spec, "s_in": spec}, {"y": spec, "s_out": spec}
    feeds = {"x": x, "s_in": runtime.zeros((2, 3), "bfloat16")}
    y, state = bound_run(runtime, session, "g", takes, gives, feeds)
    np.testing.assert_array_equal(runtime.numpy(y), x)
    (y, _) = bound_run(
        runtime, session, "g", {"x": spec, "s_in": spec}, {"y": spec, "s_out": spec}, {"x": x, "s_in": state}
    )
    np.testing.assert_array_equal(runtime.numpy(y), x)
    assert state.data_type() == "tensor(bfloat16)"
