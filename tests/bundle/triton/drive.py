"""Drives a served bundle through Triton's client, in the server's environment: recorded steps of several sequences, in
turn. Reads and writes .npz, and prints what the server says to requests that it should refuse.

    python drive.py URL MODEL STEPS.npz OUTPUTS.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient import http
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def call(client: Any, model: str, inputs: dict[str, Any], number: int, start: bool, end: bool) -> Any:
    tensors = []
    for name, array in inputs.items():
        tensors.append(http.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    found = client.infer(model, tensors, sequence_id=number, sequence_start=start, sequence_end=end)
    return found.as_numpy("output")


def refusal(client: Any, model: str, inputs: dict[str, Any], number: int, start: bool) -> str:
    try:
        call(client, model, inputs, number, start, True)  # the server would wait for an open sequence when it ends
    except InferenceServerException as error:
        return str(error)
    return ""


def main(url: str, model: str, given: str, out: str, *configs: str) -> None:
    for config in configs:  # Triton's own message classes know every field
        text_format.Parse(Path(config).read_text(), model_config_pb2.ModelConfig())
    client = http.InferenceServerClient(url)
    with np.load(given, allow_pickle=False) as data:
        sequences: dict[int, dict[str, Any]] = {}
        for key in data.files:
            number, name = key.split(":")
            sequences.setdefault(int(number), {})[name] = data[key]
    outputs: dict[str, list[Any]] = {str(number): [] for number in sequences}
    longest = max(len(array) for inputs in sequences.values() for array in inputs.values())
    for step in range(longest):
        for number, inputs in sequences.items():
            steps = len(next(iter(inputs.values())))
            if step < steps:
                now = {name: array[step] for name, array in inputs.items()}
                outputs[str(number)].append(call(client, model, now, number, step == 0, step == steps - 1))
    np.savez(out, **{number: np.stack(arrays) for number, arrays in outputs.items()})
    first = {name: array[0] for name, array in next(iter(sequences.values())).items()}
    said = {
        "never started": refusal(client, model, first, 99, False),
        "channels": refusal(client, model, {**first, "x": first["x"][:, :1]}, 98, True),
        "batch": refusal(client, model, {**first, "x": first["x"][:1]}, 97, True),
    }
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
