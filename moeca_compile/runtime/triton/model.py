"""What Triton's python backend runs: a session over the bundle beside it, and a trajectory for each sequence.

With `max_batch` sequences share calls: Triton hands over the requests of several, each with an axis of size 1 in front.

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
from moeca_compile.runtime.batched.session import BatchedSession
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.triton.config import BUNDLE, CORRID, END, READY, START
from moeca_compile.runtime.triton.sequences import Asked, Sequences


class TritonPythonModel:
    """The interface that the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle; what is wrong with it becomes the model's load error."""
        self._pb: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        parameters = {name: parameter["string_value"] for name, parameter in config["parameters"].items()}
        batching = config["sequence_batching"]
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        max_batch, budget = int(parameters.get("max_batch", 0)), int(parameters.get("budget", 0))
        self._is_batched = bool(max_batch)
        try:
            self._bundle = Session.open(folder, parameters["provider"], threads=int(parameters["threads"]) or None)
            batched = BatchedSession(self._bundle, budget, max_batch) if max_batch else None
        except MoecaError as error:
            raise self._pb.TritonModelException(str(error)) from error
        self.sequences = Sequences(
            batched or self._bundle,
            most=int(batching["oldest"]["max_candidate_sequences"]),
            idle_seconds=int(batching["max_sequence_idle_microseconds"]) / 1e6,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, in order. The steps of all of them share calls where they can."""
        pb, asked = self._pb, [self._asked(request) for request in requests]
        found = iter(self.sequences.calls([one for one in asked if one is not None]))
        responses = []
        for one in asked:
            result = {} if one is None else next(found)  # padding is no request of anybody
            if isinstance(result, MoecaError):
                responses.append(pb.InferenceResponse(output_tensors=[], error=pb.TritonError(str(result))))
                continue
            arrays = {name: array[None] if self._is_batched else array for name, array in result.items()}
            responses.append(pb.InferenceResponse([pb.Tensor(name, array) for name, array in arrays.items()]))
        return responses

    def finalize(self) -> None:
        self.sequences.close()

    def _asked(self, request: Any) -> Asked | None:
        """What a request asks for; None: Triton filled up a batch with it."""

        def array(name: str) -> Any:
            return self._pb.get_input_tensor_by_name(request, name).as_numpy()

        def control(name: str) -> int:
            return int(array(name).reshape(-1)[0])

        if not control(READY):
            return None
        inputs = {spec.name: array(spec.name) for spec in self._bundle.inputs}
        if self._is_batched:
            inputs = {name: value[0] for name, value in inputs.items()}
        return Asked(control(CORRID), bool(control(START)), bool(control(END)), inputs)
