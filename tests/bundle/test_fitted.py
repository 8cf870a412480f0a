"""Fitted weights of regions in a bundle: what torch makes of them, on every runtime, by variants and in one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import moeca_compile as moeca
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.fused import FusedSession
from moeca_compile.runtime.bundle.verify import relative_error
from moeca_compile.runtime.session import Session
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.fitted import FittedWeights
from tests.bundle.conftest import PROVIDERS, call_of, named, warnings_of
from tests.models import DiT
from tests.tools import row

STEPS = 50
ROWS = ("CC", "CC", "CC", *("FF", "FC", "FR", "CC", "FF") * 10)[:STEPS]
LEAST_DB = 60.0


@pytest.fixture(scope="module")
def fitted(schedule: Schedule) -> Schedule:
    """Weights of three values, which no polynomial of order 1 has, and which don't sum to 1."""
    weights = [
        tuple((1.25 + 0.01 * step, -0.375, 0.0625) if letter == "F" else () for letter in letters)
        for step, letters in enumerate(ROWS)
    ]
    times = tuple(500.0 - step for step in range(STEPS))
    return replace(
        schedule, rows=tuple(map(row, ROWS)), period=0, timesteps=times, fitted=FittedWeights(tuple(weights))
    )


@pytest.fixture(scope="module")
def bundle(model: DiT, fitted: Schedule, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("fitted") / "b"
    targets = ("onnx", "openvino")
    return moeca.export(model, call_of(2), fitted, path, fused=True, dynamic_batch=False, targets=targets)


def sample(model: Callable[[Any], Any]) -> list[Any]:
    """What the model gives at each step of an Euler run, and the last latent."""
    x, t, y = (one.numpy() for one in call_of(2))
    outputs = []
    for step in range(STEPS):
        outputs.append(np.asarray(model({"x": x, "t": t - np.float32(step), "y": y})))
        x = x - 0.5 * outputs[-1][:, : x.shape[1]] / STEPS
    return [*outputs, x]


@pytest.fixture(scope="module")
def expected(model: DiT, fitted: Schedule) -> list[Any]:
    handle = moeca.compile(model, schedule=fitted, inner="eager")

    def call(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return handle(*(torch.from_numpy(inputs[name]) for name in "xty")).numpy()

    return sample(call)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", [Session, FusedSession])
def test_a_run_is_torch_s(kind: Any, provider: str, bundle: Bundle, expected: list[Any]) -> None:
    with kind.open(bundle.path, provider, threads=1).trajectory() as trajectory:
        found = sample(lambda inputs: trajectory.run(inputs)["output"])
    variants = {letters: step for step, letters in reversed(list(enumerate(ROWS)))}
    assert len(variants) == 4
    for step in variants.values():  # the first step of each, which differs by rounding alone
        assert relative_error(found[step], expected[step]) < 1e-4
    error = float(np.square(found[-1] - expected[-1]).mean())
    assert 10 * np.log10(np.square(np.ptp(expected[-1])) / max(error, 1e-30)) > LEAST_DB


def test_at_other_timesteps_the_polynomial_serves(bundle: Bundle) -> None:
    session = Session.open(bundle.path, threads=1)
    call = named(call_of(2))
    with session.trajectory() as trajectory:
        said = warnings_of(
            lambda: [trajectory.run({**call, "t": call["t"] - 1.5 * np.float32(step)}) for step in range(6)]
        )
    assert ["fitted weights aren't used, for the call comes at another step" in one for one in said].count(True) == 1
