"""A reused step passes few functions and files of the package: a longer path costs time in every step, and a reader
must follow all of it."""

from __future__ import annotations

from typing import Any

import pytest

import moeca_compile as moeca
from benchmarks import models, way

MAX_FRAMES = 60
MAX_FILES = 12


@pytest.fixture(scope="module")
def model() -> Any:
    network = models.network(depth=1).eval().requires_grad_(False)
    compiled = moeca.compile(network, schedule="uniform:3", inner="eager")
    moeca.warmup(compiled, *models.example_inputs())
    return compiled


@pytest.mark.parametrize("kind", way.WAYS)
def test_the_path_of_a_reused_step_is_short(model: Any, kind: str) -> None:
    counts = way.reused_step(model, kind)
    assert 20 < counts.frames <= MAX_FRAMES
    assert 5 < counts.files <= MAX_FILES
    assert counts.files <= counts.changes <= counts.frames


def test_code_outside_the_package_is_not_counted() -> None:
    with way.counted() as counts:
        sorted([2, 1])
    assert vars(counts) == {"frames": 0, "files": 0, "changes": 0}
