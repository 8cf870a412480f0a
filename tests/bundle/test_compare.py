"""`compare` of a bundle: cached steps beside computed ones, by a sampler of numpy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import moeca_compile as moeca
from moeca_compile.cli import app
from moeca_compile.errors import OptionError, StateError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import call_of, named

STEPS = 6


def sample(step: Any, seed: int) -> np.ndarray[Any, Any]:
    inputs = named(call_of(2, seed))
    for number in range(STEPS):
        inputs["t"] = np.full_like(inputs["t"], 900.0 - 100 * number)
        (output,) = step(inputs).values()
        inputs["x"] = inputs["x"] - 0.1 * output
    return inputs["x"]


def guided(step: Any, seed: int) -> np.ndarray[Any, Any]:
    inputs = named(call_of(2, seed))
    for number in range(STEPS):
        inputs["t"] = np.full_like(inputs["t"], 900.0 - 100 * number)
        (a,), (b,) = (step(inputs, stream=name).values() for name in ("cond", "uncond"))
        inputs["x"] = inputs["x"] - 0.05 * (a + b)
    return inputs["x"]


def test_a_bundle_is_compared_with_its_computed_self(exported: Bundle) -> None:
    session = Session.open(exported.path)
    comparison = moeca.compare(session, sample, seeds=2)
    assert [contender.name for contender in comparison.contenders] == ["computed", "cached"]
    assert comparison.graph_speedup is None
    assert comparison.speedup == comparison.caching_speedup
    with session.trajectory() as trajectory:
        cached = sample(trajectory.run, 1)
        stats = trajectory.stats()
    assert np.array_equal(comparison.samples["cached"][2:], cached)
    assert np.array_equal(comparison.samples["computed"][2:], sample(session.run, 1))
    assert comparison.mac_fraction == stats.mac_fraction < 1
    assert stats.speedup is not None
    assert 20 < comparison.psnr_db < 150
    assert "graph" not in str(comparison)


def test_streams_of_a_bundle_are_told_apart(exported: Bundle) -> None:
    assert moeca.compare(Session.open(exported.path), guided, seeds=1).psnr_db > 20


def test_a_sampler_that_calls_no_step_of_the_bundle_is_refused(exported: Bundle) -> None:
    with pytest.raises(StateError, match="never called the model that it was given"):
        moeca.compare(Session.open(exported.path), lambda step, seed: np.zeros((2, 2)), seeds=1)


def test_a_bundle_is_compared_at_the_command_line(exported: Bundle) -> None:
    words = ["compare", str(exported.path), "--sample", "tests.bundle.test_compare:sample", "--seeds", "1", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert [each["name"] for each in json.loads(done.stdout)["contenders"]] == ["computed", "cached"]
    refused = CliRunner().invoke(app, [*words, "--schedule", "uniform:2"]).exception
    assert isinstance(refused, OptionError)
    assert str(refused).startswith("--schedule: a bundle has its own")
