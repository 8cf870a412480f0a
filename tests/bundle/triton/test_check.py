"""Configs against the graphs they are for: what fits passes, every difference is named."""

from __future__ import annotations

import copy as copies
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from onnx import TensorProto, helper

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.manifest import TensorSpec
from moeca_compile.runtime.triton.check import check_python, check_state, signature_of
from moeca_compile.runtime.triton.config import Config, python_config, state_config
from moeca_compile.runtime.triton.pbtxt import Name, dumps, loads
from tests.bundle.triton.graphs import one_file

Edit = Callable[[Any], Any]


@pytest.fixture
def fused() -> bytes:
    return one_file()


def served(bundle: Bundle, **change: Any) -> Config:
    given = {"sequences": 4, "idle_seconds": 60, "provider": "CPUExecutionProvider", "threads": 1, **change}
    return python_config("small", bundle.manifest.inputs, bundle.manifest.outputs, **given)


def kept(graph: bytes, batch: int = 2) -> Config:
    inputs, outputs = signature_of(graph)
    state = {name: inputs[f"{name}_in"] for name in ("state_001", "step", "state_000")}
    return state_config(
        "small_fused", [inputs["x"]], [outputs["y"]], state, batch, sequences=4, idle_seconds=60
    )  # fmt: skip


def test_the_signature_of_a_graph(fused: bytes) -> None:
    inputs, outputs = signature_of(fused)
    assert inputs["x"] == TensorSpec("x", "float32", ("batch", 3))
    assert outputs["step_out"] == TensorSpec("step_out", "int64", (1,))
    with pytest.raises(BundleError, match="the size 'width' is neither"):
        signature_of(one_file("width"))
    with pytest.raises(BundleError, match="isn't an ONNX graph"):
        signature_of(b"nothing")


def test_a_python_config_that_fits(exported: Bundle) -> None:
    config = served(exported)
    check_python(dumps(config), exported.graphs)
    assert [one["dims"] for one in config["input"]] == [[-1, 4, 8, 8], [-1], [-1]]


PYTHON: dict[str, tuple[Edit, str]] = {
    "dims": (lambda c: c["input"][0].update(dims=[-1, 4, 8, 9]), r"x is TYPE_FP32 \[-1, 4, 8, 9\], the graph has"),
    "a dtype": (lambda c: c["input"][2].update(data_type=Name("TYPE_INT32")), "y is TYPE_INT32"),
    "an input": (lambda c: c["input"].pop(), "the inputs are"),
    "a name": (lambda c: c["output"][0].update(name="image"), "the outputs are"),
    "twice": (lambda c: c["input"].append(c["input"][0]), "a name stands twice"),
    "a control": (lambda c: c["sequence_batching"]["control_input"].pop(), "the controls are"),
    "no batching": (lambda c: c.pop("sequence_batching"), "the controls are"),
}


@pytest.mark.parametrize("what", PYTHON)
def test_a_python_config_that_does_not_fit(what: str, exported: Bundle) -> None:
    edit, says = PYTHON[what]
    config = copies.deepcopy(served(exported))
    edit(config)
    with pytest.raises(BundleError, match=says):
        check_python(dumps(config), exported.graphs)


def test_what_the_python_backend_cannot_serve(exported: Bundle) -> None:
    given: Any = {"sequences": 4, "idle_seconds": 60, "provider": "", "threads": 1}
    with pytest.raises(BundleError, match=r"\['END'\] have names of Triton's controls"):
        python_config("small", [TensorSpec("END", "float32", (1,))], [], **given)


def test_bfloat16_is_float32_at_the_face() -> None:
    given: Any = {"sequences": 4, "idle_seconds": 60, "provider": "", "threads": 1}
    spec = TensorSpec("z", "bfloat16", ("batch", 2))
    config = python_config("small", [spec], [replace(spec, name="out")], **given)
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    check_python(dumps(config), [graph_of_halves()])


def graph_of_halves() -> bytes:
    ends = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["batch", 2]) for name in ("z", "out")]
    made = helper.make_graph([helper.make_node("Relu", ["z"], ["out"])], "g", ends[:1], ends[1:])
    return helper.make_model(made).SerializeToString()


def test_a_state_config_that_fits(fused: bytes) -> None:
    config = kept(fused)
    check_state(dumps(config), fused, 2)
    states = config["sequence_batching"]["state"]
    assert [one["input_name"] for one in states] == ["state_000_in", "state_001_in", "step_in"]
    assert states[0]["dims"] == [2, 3]
    with pytest.raises(BundleError, match="x is"):
        check_state(dumps(config), fused, 3)


def test_single_values() -> None:
    """Triton has no scalars."""
    config = python_config(
        "m", [TensorSpec("t", "float32", ())], [], sequences=1, idle_seconds=1, provider="", threads=0
    )
    found = loads(dumps(config))["input"]
    assert (found["dims"], found["reshape"]) == ([1], {"shape": []})


def swap(config: Any) -> None:
    first, second = config["sequence_batching"]["state"][:2]
    first["output_name"], second["output_name"] = second["output_name"], first["output_name"]


def state(**change: Any) -> Edit:
    return lambda config: config["sequence_batching"]["state"][0].update(change)


STATE: dict[str, tuple[Edit, str]] = {
    "dims": (state(dims=[2, 4]), r"state_000_in is TYPE_FP32 \[2, 4\]"),
    "a dtype": (state(data_type=Name("TYPE_FP16")), "state_000_in is TYPE_FP16"),
    "a name": (state(input_name="state_007_in"), "the inputs are"),
    "an output": (state(output_name="state_001_out"), "a name stands twice"),
    "swapped": (swap, "sort differently"),
    "a state less": (lambda c: c["sequence_batching"]["state"].pop(), "the inputs are"),
    "no beginning": (lambda c: c["sequence_batching"]["state"][0].pop("initial_state"), "doesn't begin as zeros"),
    "another beginning": (
        lambda c: c["sequence_batching"]["state"][0]["initial_state"].update(dims=[1]), "doesn't begin as zeros",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", STATE)
def test_a_state_config_that_does_not_fit(what: str, fused: bytes) -> None:
    edit, says = STATE[what]
    config = copies.deepcopy(kept(fused))
    edit(config)
    with pytest.raises(BundleError, match=says):
        check_state(dumps(config), fused, 2)
