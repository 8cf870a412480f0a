"""Through Inductor: right, and compiled once. The second process of a user takes everything from the on-disk cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import moeca_compile as moeca
from tests.sampling import Taped, compiled, dit, noise, plain, records, run, under_compile_lock

ROOT = Path(__file__).parents[2]
GRAPHS = 2  # a full variant and a forecasting one

pytestmark = pytest.mark.slow  # two processes that compile


def report() -> dict[str, Any]:
    """What one process sees: how far Inductor's variants are from eager ones, and what it had to compile for them."""
    torch.set_num_threads(1)
    module = dit()
    model, by_hand = compiled(module, inner="inductor"), compiled(module)
    inputs = noise(1, 2), torch.full((2,), 500.0), torch.tensor([1, 2])
    warm = moeca.warmup(model, *inputs)
    graphs = _counted()
    tape = Taped(model)
    with torch.no_grad():
        run(plain(tape))
        ran = [record.variant for record in records(model)]
        eager = [module(*call) for call in tape.inputs]
        forecast = under_compile_lock(by_hand, lambda m: (m(*call) for call in tape.inputs))
        distance_warm = _distance([warm], [module(*inputs)])
    full = [i for i, name in enumerate(ran) if name == "v0"]
    return {
        "counters": graphs,
        "ran": ran,
        "warm_from_eager": distance_warm,
        "full_from_eager": _distance([tape.outputs[i] for i in full], [eager[i] for i in full]),
        "all_from_inner_eager": _distance(tape.outputs, forecast),
        "all_from_eager": _distance(tape.outputs, eager),
        "compiled_while_sampling": _counted() != graphs,
    }


def _counted() -> dict[str, int]:
    return {**counters["inductor"], **counters["aot_autograd"]}


def _distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative distance ||a - b|| / ||b||."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The reports of two processes, one after the other, over one empty cache."""
    cache = tmp_path_factory.mktemp("inductor")
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    reports = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error::UserWarning:moeca_compile", "-m", "tests.lowering.test_cache_warm"],
            cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    return reports


def test_the_first_process_compiles_each_graph_once(processes: list[dict[str, Any]]) -> None:
    found = processes[0]["counters"]
    assert found["fxgraph_cache_miss"] == found["autograd_cache_miss"] == GRAPHS
    assert "fxgraph_cache_hit" not in found


def test_the_second_process_compiles_nothing(processes: list[dict[str, Any]]) -> None:
    found = processes[1]["counters"]
    assert found["fxgraph_cache_hit"] == found["autograd_cache_hit"] == GRAPHS
    assert not [name for name in found if name.endswith(("cache_miss", "cache_bypass"))]


@pytest.mark.parametrize("number", [0, 1], ids=["compiled", "from the cache"])
def test_variants_through_inductor_are_right(processes: list[dict[str, Any]], number: int) -> None:
    found = processes[number]
    assert found["ran"] == ["v0", "v1", "v1"] * 3 + ["v0"]
    assert found["warm_from_eager"] < 1e-5
    assert found["full_from_eager"] < 1e-5
    assert found["all_from_inner_eager"] < 1e-5
    assert found["all_from_eager"] > 1e-3, "forecasts that equal eager show nothing"
    assert not found["compiled_while_sampling"]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report()) + "\n")
