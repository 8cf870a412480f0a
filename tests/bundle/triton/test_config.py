"""The configs, as protobuf's own parser reads them."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import text_format

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.manifest import TensorSpec
from moeca_compile.runtime.triton.config import CONTROLS, GATHER, python_config, state_config
from moeca_compile.runtime.triton.pbtxt import Name, dumps
from tests.bundle.triton.model_config import parse

GIVEN: Any = {"sequences": 4, "idle_seconds": 60, "provider": "CPUExecutionProvider", "threads": 1}


def test_a_python_config(exported: Bundle) -> None:
    config = parse(dumps(python_config("small", exported.manifest.inputs, exported.manifest.outputs, **GIVEN)))
    assert [(tensor["name"], tensor["data_type"], tensor["dims"]) for tensor in config["input"]] == [
        ("x", "TYPE_FP32", [-1, 4, 8, 8]),
        ("t", "TYPE_FP32", [-1]),
        ("y", "TYPE_INT64", [-1]),
    ]
    assert [tensor["name"] for tensor in config["output"]] == ["output"]
    assert [control["name"] for control in config["sequence_batching"]["control_input"]] == list(CONTROLS)
    assert {one["key"]: one["value"]["string_value"] for one in config["parameters"]} == {
        "provider": "CPUExecutionProvider",
        "threads": "1",
    }


def test_a_config_of_sequences_that_share_calls(exported: Bundle) -> None:
    specs = exported.manifest.inputs, exported.manifest.outputs
    config = parse(dumps(python_config("small", *specs, **GIVEN, max_batch=8, budget=1000)))
    assert config["max_batch_size"] == 8
    assert all(tensor["allow_ragged_batch"] for tensor in config["input"])
    assert int(config["sequence_batching"]["oldest"]["max_queue_delay_microseconds"]) == GATHER
    parameters = {one["key"]: one["value"]["string_value"] for one in config["parameters"]}
    assert (parameters["max_batch"], parameters["budget"]) == ("8", "1000")


def test_an_input_named_as_a_control() -> None:
    with pytest.raises(BundleError, match=r"\['END'\] have names of Triton's controls"):
        python_config("small", [TensorSpec("END", "float32", (1,))], [], **GIVEN)


def test_bfloat16_is_served_as_float32() -> None:
    spec = TensorSpec("z", "bfloat16", ("batch", 2))
    assert parse(dumps(python_config("small", [spec], [], **GIVEN)))["input"][0]["data_type"] == "TYPE_FP32"


def test_single_values() -> None:
    """Triton has no scalars."""
    (tensor,) = parse(dumps(python_config("m", [TensorSpec("t", "float32", ())], [], **GIVEN)))["input"]
    assert (tensor["dims"], tensor["reshape"]) == ([1], {})


def test_states_are_in_the_order_of_their_names_and_begin_as_zeros() -> None:
    state = {
        "state_001": TensorSpec("state_001", "float16", ("2*batch", 3)),
        "moeca_step": TensorSpec("moeca_step", "int64", (1,)),
        "state_000": TensorSpec("state_000", "float32", ("batch", 3)),
    }
    config = parse(dumps(state_config("m", [], [], state, 2, sequences=4, idle_seconds=60)))
    states = config["sequence_batching"]["state"]
    inputs, outputs = ([entry[f"{side}_name"] for entry in states] for side in ("input", "output"))
    assert (sorted(inputs), sorted(outputs)) == (inputs, outputs)
    assert [(entry["data_type"], entry["dims"]) for entry in states] == [
        ("TYPE_INT64", [1]),
        ("TYPE_FP32", [2, 3]),
        ("TYPE_FP16", [4, 3]),
    ]
    for entry in states:
        sizes = {"dims": entry["dims"], "data_type": entry["data_type"]}
        assert entry["initial_state"] == [{**sizes, "name": "zeros", "zero_data": True}]


def test_text_that_needs_escapes() -> None:
    name = 'a "quoted" \\ name\n\t\u00e9'
    config = parse(dumps({"name": name, "input": [{"name": "x", "data_type": Name("TYPE_BOOL"), "dims": [-1, 4]}]}))
    assert config == {"name": name, "input": [{"name": "x", "data_type": "TYPE_BOOL", "dims": [-1, 4]}]}


def test_the_excerpt_refuses_what_it_does_not_know() -> None:
    with pytest.raises(text_format.ParseError):
        parse(dumps({"unknown": 1}))
