"""The python backend's model without a server: Triton's side of the interface is played here."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moeca_compile.errors import OptionError, StateError
from moeca_compile.runtime.batched.budget import needs_of
from moeca_compile.runtime.batched.session import BatchedSession
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.triton import write_repository
from moeca_compile.runtime.triton.model import TritonPythonModel
from moeca_compile.runtime.triton.sequences import Sequences
from tests.bundle.conftest import call_of, named


@pytest.fixture(scope="module")
def session(exported: Bundle) -> Session:
    """On the provider that the model has."""
    return Session.open(exported.path, threads=1)


def step_of(number: int, step: int) -> dict[str, Any]:
    return named(call_of(2, seed=100 * number + step))


def wanted(session: Session, number: int, steps: int) -> list[Any]:
    with session.trajectory() as trajectory:
        return [trajectory.run(step_of(number, step))["output"] for step in range(steps)]


def test_interleaved_sequences(session: Session) -> None:
    sequences = Sequences(session, most=2, idle_seconds=60)
    found: dict[int, list[Any]] = {1: [], 2: []}
    for step in range(6):
        for number, outputs in found.items():
            outputs.append(sequences.call(number, step == 0, step == 5, step_of(number, step))["output"])
    assert len(sequences) == 0
    for number, outputs in found.items():
        assert all(map(np.array_equal, outputs, wanted(session, number, 6)))


def test_a_sequence_that_starts_again(session: Session) -> None:
    sequences = Sequences(session, most=2, idle_seconds=60)
    for start in (True, False, False, True):
        found = sequences.call(1, start, False, step_of(1, 0))
    assert np.array_equal(found["output"], wanted(session, 1, 1)[0])


def test_sequences_that_are_not_open(session: Session) -> None:
    clock = [0.0]
    sequences = Sequences(session, most=2, idle_seconds=10, now=lambda: clock[0])
    with pytest.raises(StateError, match="sequence 1 isn't open"):
        sequences.call(1, False, False, step_of(1, 0))
    for number in (1, 2):
        sequences.call(number, True, False, step_of(number, 0))
    sequences.call(1, False, False, step_of(1, 1))
    sequences.call(3, True, False, step_of(3, 0))  # one too many: 2 was unused for longest
    with pytest.raises(StateError, match="sequence 2 isn't open"):
        sequences.call(2, False, False, step_of(2, 1))
    clock[0] = 11.0
    with pytest.raises(StateError, match="idle for 10 s"):
        sequences.call(1, False, False, step_of(1, 2))
    assert len(sequences) == 0


def test_a_step_that_fails_does_not_count(session: Session) -> None:
    sequences = Sequences(session, most=2, idle_seconds=60)
    with pytest.raises(Exception, match="the model takes"):
        sequences.call(1, True, False, {})
    found = sequences.call(1, False, False, step_of(1, 0))
    assert np.array_equal(found["output"], wanted(session, 1, 1)[0])
    with pytest.raises(Exception, match="the model takes"):
        sequences.call(1, False, True, {})
    assert len(sequences) == 0  # the end counts all the same


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> Any:
        return self.array


class Response:
    def __init__(self, output_tensors: list[Tensor], error: Any = None) -> None:
        self.output_tensors, self.error = output_tensors, error


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, Response, str
    module.TritonModelException = type("TritonModelException", (Exception,), {})
    module.get_input_tensor_by_name = lambda request, name: Tensor(name, request[name])
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def started(bundle: Bundle, folder: Path, provider: str = "CPUExecutionProvider", **shared: int) -> TritonPythonModel:
    place, _ = write_repository(bundle, folder, threads=1, **shared)
    parameters = {"provider": provider, "threads": "1"} | {name: str(value) for name, value in shared.items()}
    config = {
        "parameters": {name: {"string_value": value} for name, value in parameters.items()},
        "sequence_batching": {
            "max_sequence_idle_microseconds": "60000000", "oldest": {"max_candidate_sequences": 2},
        },
    }  # fmt: skip
    one = TritonPythonModel()
    one.initialize({"model_config": json.dumps(config), "model_repository": str(place), "model_version": "1"})
    return one


def request(step: int, number: int = 1, ready: int = 1, start: bool = False, end: bool = False) -> dict[str, Any]:
    flags = {"START": int(start), "END": int(end), "READY": ready}
    controls: dict[str, Any] = {name: np.array([value], np.int32) for name, value in flags.items()}
    return step_of(number, step) | controls | {"CORRID": np.array([number], np.uint64)}


def test_the_model(exported: Bundle, session: Session, tmp_path: Path, backend: ModuleType) -> None:
    model = started(exported, tmp_path)
    first, nobody, second = model.execute([request(0, start=True), request(0, 9, ready=0), request(1, end=True)])
    assert (nobody.output_tensors, nobody.error) == ([], None)
    for response, array in zip((first, second), wanted(session, 1, 2), strict=True):
        (tensor,) = response.output_tensors
        assert tensor.name == "output"
        assert np.array_equal(tensor.array, array)
    (late,) = model.execute([request(2)])
    assert "sequence 1 isn't open" in late.error
    model.execute([request(0, start=True)])
    model.finalize()
    assert len(model.sequences) == 0


def in_front(request: dict[str, Any]) -> dict[str, Any]:
    """A request with Triton's batch axis."""
    return {name: array[None] for name, array in request.items()}


def test_sequences_that_share_calls(exported: Bundle, session: Session, tmp_path: Path, backend: ModuleType) -> None:
    """Five sequences of 2 samples at random offsets, several requests handed over at once; a sixth finds no room."""
    needs = needs_of(exported.manifest)
    model = started(exported, tmp_path, max_batch=4, budget=10 * needs.lane + 4 * needs.call)
    model.sequences.most, steps, dice = 6, 7, random.Random(0)
    found: dict[int, list[Any]] = {number: [] for number in range(1, 6)}
    was_full = False
    while any(len(outputs) < steps for outputs in found.values()):
        numbers = [number for number, outputs in found.items() if len(outputs) < steps and dice.random() < 0.6]
        asked = [(number, len(found[number])) for number in numbers]
        requests = [in_front(request(step, n, start=step == 0, end=step == steps - 1)) for n, step in asked]
        for (number, _), response in zip(asked, model.execute(requests), strict=True):
            (tensor,) = response.output_tensors
            found[number].append(tensor.array[0])
        if len(model.sequences) == 5:
            was_full = True
            (none,) = model.execute([in_front(request(0, 9, start=True, end=True))])
            assert "0 of the pool's 10 lanes are free, and the trajectory has 2 samples" in none.error
    assert was_full
    for number, outputs in found.items():
        assert all(map(np.array_equal, outputs, wanted(session, number, steps)))
    batched = model.sequences.session
    assert isinstance(batched, BatchedSession)
    assert len(batched.calls) < 5 * steps
    (late,) = model.execute([in_front(request(2))])
    assert "sequence 1 isn't open" in late.error
    assert batched.pool.free == batched.pool.lanes


def test_shared_calls_that_cannot_be(exported: Bundle, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="give at least"):
        write_repository(exported, tmp_path, max_batch=4, budget=1)
    with pytest.raises(OptionError, match="budget=0: expected a whole number"):
        write_repository(exported, tmp_path, max_batch=4)
    with pytest.raises(OptionError, match="max_batch=0: expected a whole number"):
        write_repository(exported, tmp_path, budget=2**20)


def test_a_model_that_cannot_be_loaded(exported: Bundle, tmp_path: Path, backend: Any) -> None:
    with pytest.raises(backend.TritonModelException, match="no 'NoSuchProvider'"):
        started(exported, tmp_path, provider="NoSuchProvider")
