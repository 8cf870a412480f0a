"""The counts of the way through the code: that they count, and that a reused step's way doesn't get longer unseen."""

from __future__ import annotations

from typing import Any

import pytest

import moeca_compile as moeca
from benchmarks import models, way


@pytest.fixture(scope="module")
def model() -> Any:
    made = moeca.compile(models.network(depth=1).eval().requires_grad_(False), schedule="uniform:3", inner="eager")
    moeca.warmup(made, *models.example_inputs())
    return made


@pytest.mark.parametrize("kind", way.WAYS)
def test_a_reused_step_is_short(model: Any, kind: str) -> None:
    found = way.reused_step(model, kind)
    assert 20 < found.frames <= 130
    assert 5 < found.files <= 24
    assert found.files <= found.changes <= found.frames


def test_nothing_of_ours_is_nothing() -> None:
    with way.counted() as found:
        sorted([2, 1])
    assert vars(found) == {"frames": 0, "files": 0, "changes": 0}
