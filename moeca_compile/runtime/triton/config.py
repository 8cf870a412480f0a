"""`config.pbtxt` of the two ways to serve a bundle: the python backend over it, and its fused graph.

The batch of a call is a dimension of the request like the others, for guidance wants both halves in one call, and sizes
like 256 * batch have no batch dimension to take off. Triton's sequence batcher takes requests of one sample only. So
`max_batch_size` is 0; where sequences share calls, a request is Triton's one sample, with an axis of size 1 in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeca_compile.dtypes import DTYPES
from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle import bfloat16
from moeca_compile.runtime.bundle.manifest import TensorSpec
from moeca_compile.runtime.triton.pbtxt import Name

BUNDLE, MODEL_FILE = "bundle", "model.onnx"
START, END, READY, CORRID = CONTROLS = ("START", "END", "READY", "CORRID")
GATHER = 2000  # microseconds that a request waits for those of other sequences
Config = dict[str, Any]


def python_config(
    name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *, sequences: int, idle_seconds: int,
    provider: str, threads: int, max_batch: int = 0, budget: int = 0,
) -> Config:  # fmt: skip
    """The python backend: any batch, one trajectory a sequence.

    Args:
        max_batch: samples of a call that sequences share; 0: they don't.
        budget: bytes for the state of all sequences that share calls.

    Raises:
        BundleError: an input has the name of a control.
    """
    if clashes := sorted({spec.name for spec in inputs} & set(CONTROLS)):
        raise BundleError(f"the model's inputs {clashes} have names of Triton's controls: rename them and export again")
    plain = {START: "CONTROL_SEQUENCE_START", END: "CONTROL_SEQUENCE_END", READY: "CONTROL_SEQUENCE_READY"}
    flags = {control: {"kind": Name(kind), "int32_false_true": [0, 1]} for control, kind in plain.items()}
    corrid = {"kind": Name("CONTROL_SEQUENCE_CORRID"), "data_type": Name("TYPE_UINT64")}
    parameters = {"provider": provider, "threads": str(threads)}
    ragged: Config = {"allow_ragged_batch": Name("true")} if max_batch else {}
    if max_batch:
        parameters |= {"max_batch": str(max_batch), "budget": str(budget)}
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": max_batch,
        "input": [_tensor(as_served(spec), -1) | ragged for spec in inputs],
        "output": [_tensor(as_served(spec), -1) for spec in outputs],
        "sequence_batching": {
            "max_sequence_idle_microseconds": idle_seconds * 1_000_000,
            "control_input": [
                *({"name": control, "control": flag} for control, flag in flags.items()),
                {"name": CORRID, "control": corrid},
            ],
            "oldest": {
                "max_candidate_sequences": sequences,
                **({"max_queue_delay_microseconds": GATHER} if max_batch else {}),
            },
        },
        "instance_group": {"kind": Name("KIND_CPU"), "count": 1},
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()],
    }


def state_config(
    name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], state: Mapping[str, TensorSpec], batch: int,
    *, sequences: int, idle_seconds: int,
) -> Config:  # fmt: skip
    """onnxruntime's backend with implicit state, for one batch: a state's sizes are fixed before the first request.

    Args:
        state: by name, as `<name>_in` and `<name>_out` of the graph; a sequence starts with zeros.
    """
    return {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": 0,
        "default_model_filename": MODEL_FILE,
        "input": [_tensor(spec, batch) for spec in inputs],
        "output": [_tensor(spec, batch) for spec in outputs],
        "sequence_batching": {
            "max_sequence_idle_microseconds": idle_seconds * 1_000_000,
            "oldest": {"max_candidate_sequences": sequences},
            # in the order of their names: Triton pairs sorted inputs with sorted outputs (server#8586)
            "state": [_state(stem, spec, batch) for stem, spec in sorted(state.items())],
        },
    }


def as_served(spec: TensorSpec) -> TensorSpec:
    """As a session takes and gives it: bfloat16 as float32."""
    return TensorSpec(spec.name, "float32", spec.shape) if spec.dtype == bfloat16.NAME else spec


def _tensor(spec: TensorSpec, batch: int) -> Config:
    return {"name": spec.name, "data_type": Name(DTYPES[spec.dtype].triton), **_sizes(spec, batch)}


def _state(name: str, spec: TensorSpec, batch: int) -> Config:
    sizes = {"data_type": Name(DTYPES[spec.dtype].triton), **_sizes(spec, batch)}
    return {
        "input_name": f"{name}_in",
        "output_name": f"{name}_out",
        **sizes,
        "initial_state": {**sizes, "name": "zeros", "zero_data": True},
    }


def _sizes(spec: TensorSpec, batch: int) -> Config:
    """`dims` at a batch; with batch -1, -1 wherever they depend on it. Triton has no scalars: a single value stands for
    one, and is reshaped."""
    if not spec.shape:
        return {"dims": [1], "reshape": {"shape": []}}
    return {"dims": [dim if isinstance(dim, int) else -1 for dim in spec.shape] if batch < 0 else [*spec.sizes(batch)]}
