"""Shared calls of bundles whose steps compute parts of regions, or whose rows depend on the request's own drift."""

from __future__ import annotations

from pathlib import Path

import pytest

import moeca_compile as moeca
from benchmarks.batched import one_at_a_time
from moeca_compile.runtime import BatchedSession
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import call_of, small_model
from tests.bundle.test_batched import BUDGET, STEPS, sampler
from tests.bundle.test_partial import BY_DRIFT


@pytest.fixture
def drift(tmp_path: Path) -> Bundle:
    return moeca.export(small_model(), call_of(2), BY_DRIFT, tmp_path / "b", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adaptive", "drift"])
def test_requests_get_what_they_get_alone(kind: str, request: pytest.FixtureRequest) -> None:
    """Requests of 1 and 2 samples, the last four of them two calls later."""
    session = Session.open(request.getfixturevalue(kind).path, threads=1)
    batched = BatchedSession(session, BUDGET, max_batch=6)
    batches = [1 + seed % 2 for seed in range(12)]
    requests = [batched.submit(sampler(seed, batch)) for seed, batch in enumerate(batches[:8])]
    batched.step(), batched.step()
    requests += [batched.submit(sampler(seed, batch)) for seed, batch in enumerate(batches[8:], 8)]
    batched.run()
    for seed, (batch, request) in enumerate(zip(batches, requests, strict=True)):
        assert request.result().tobytes() == one_at_a_time(session, sampler(seed, batch)).tobytes(), seed
    assert len({record.variant for record in batched.calls}) > 1
    assert len(batched.calls) < len(batches) * STEPS / 2
