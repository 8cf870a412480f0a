"""What Triton's python backend runs: a session over the bundle beside it, and a trajectory for each sequence.

Triton's Python needs this package (`pip install --no-deps moeca-compile`), msgspec, numpy and the
runtime; torch isn't needed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeca_compile.errors import MoecaError
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.triton.config import BUNDLE, CORRID, END, READY, START
from moeca_compile.runtime.triton.sequences import Sequences


class TritonPythonModel:
    """The interface that the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle; what is wrong with it becomes the model's load error."""
        self._pb: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        parameters = {name: parameter["string_value"] for name, parameter in config["parameters"].items()}
        batching = config["sequence_batching"]
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        try:
            session = Session.open(folder, parameters["provider"], threads=int(parameters["threads"]) or None)
        except MoecaError as error:
            raise self._pb.TritonModelException(str(error)) from error
        self.sequences = Sequences(
            session,
            most=int(batching["oldest"]["max_candidate_sequences"]),
            idle_seconds=int(batching["max_sequence_idle_microseconds"]) / 1e6,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, in order."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        self.sequences.close()

    def _respond(self, request: Any) -> Any:
        def control(name: str) -> int:
            return int(self._pb.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0])

        pb, session = self._pb, self.sequences.session
        if not control(READY):  # padding, not a request of anybody
            return pb.InferenceResponse(output_tensors=[])
        try:
            inputs = {spec.name: pb.get_input_tensor_by_name(request, spec.name).as_numpy() for spec in session.inputs}
            outputs = self.sequences.call(control(CORRID), bool(control(START)), bool(control(END)), inputs)
        except MoecaError as error:
            return pb.InferenceResponse(output_tensors=[], error=pb.TritonError(str(error)))
        return pb.InferenceResponse(output_tensors=[pb.Tensor(name, array) for name, array in outputs.items()])
