"""Requests at different steps share calls: each gets bit for bit what it gets alone, within the told memory."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import moeca_compile as moeca
from benchmarks.batched import one_at_a_time
from moeca_compile.errors import BundleError, OptionError, StateError
from moeca_compile.runtime import BatchedSession
from moeca_compile.runtime.batched.budget import needs_of
from moeca_compile.runtime.batched.calls import PATIENCE, Waiting, cheap_first, oldest_first
from moeca_compile.runtime.batched.joining import joined
from moeca_compile.runtime.batched.pool import StatePool
from moeca_compile.runtime.batched.requests import Sampler
from moeca_compile.runtime.batched.session import zeros
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import call_of, named, small_model

BUDGET = 2**22
STEPS = 7


def sampler(seed: int, batch: int = 1, steps: int = STEPS) -> Generator[dict[str, Any], dict[str, Any], Any]:
    """Euler steps of one request, with a timestep of its own."""
    call = named(call_of(batch, seed=seed))
    x = call["x"]
    for step in range(steps):
        outputs = yield {"x": x, "t": call["t"] - 50 * step, "y": call["y"]}
        x = x - outputs["output"][:, : x.shape[1]] / steps
    return x


def test_requests_at_different_steps_get_what_they_get_alone(session: Session) -> None:
    """At random offsets, with batches of 1 to 3."""
    dice = random.Random(0)
    batches = [dice.choice((1, 1, 2, 3)) for _ in range(12)]
    expected = [one_at_a_time(session, sampler(seed, batch)) for seed, batch in enumerate(batches)]
    batched = BatchedSession(session, BUDGET, max_batch=6)
    requests = []
    for seed, batch in enumerate(batches):
        requests.append(batched.submit(sampler(seed, batch), steps=STEPS, stream=str(seed)))
        for _ in range(dice.randrange(4)):
            batched.step()
    batched.run()
    for request, array in zip(requests, expected, strict=True):
        assert request.result().tobytes() == array.tobytes()
    assert batched.pool.free == batched.pool.lanes
    assert sum(record.requests for record in batched.calls) == len(batches) * STEPS
    assert len(batched.calls) < len(batches) * STEPS / 2
    assert max(record.samples for record in batched.calls) == 6


def test_threads_share_calls(session: Session) -> None:
    expected = [one_at_a_time(session, sampler(seed)) for seed in range(4)]
    batched = BatchedSession(session, BUDGET, gather=1.0)
    begin, results = threading.Barrier(4), {}

    def draw(seed: int) -> None:
        request = sampler(seed)
        with batched.trajectory(steps=STEPS) as trajectory:
            begin.wait(30)
            try:
                inputs = next(request)
                while True:
                    inputs = request.send(trajectory.run(inputs))
            except StopIteration as end:
                results[seed] = end.value

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [results[seed].tobytes() for seed in range(4)] == [array.tobytes() for array in expected]
    assert len(batched.calls) < 4 * STEPS


def test_requests_wait_for_room_in_their_order(exported: Bundle) -> None:
    session = Session.open(exported.path, threads=1)
    needs = needs_of(session.manifest)
    batched = BatchedSession(session, 2 * needs.lane + 2 * needs.call, max_batch=2)
    assert batched.pool.lanes == 2
    requests = [batched.submit(sampler(seed, batch)) for seed, batch in enumerate((1, 2, 1))]
    ends = []
    while batched.step():
        ends += [seed for seed, request in enumerate(requests) if request.done and seed not in ends]
    assert ends == [0, 1, 2]
    assert requests[1].result().tobytes() == one_at_a_time(session, sampler(1, 2)).tobytes()


def test_memory_is_within_the_budget(exported: Bundle) -> None:
    """What numpy allocates beside inputs and outputs, which are the caller's, in a run of as many as have room."""
    session = Session.open(exported.path, threads=1)
    needs = needs_of(session.manifest)
    budget = 64 * needs.lane + 8 * needs.call
    tracemalloc.start()
    try:
        batched = BatchedSession(session, budget, exact=False)
        requests = [batched.submit(sampler(seed)) for seed in range(64)]
        tracemalloc.reset_peak()
        batched.step()
        batched.run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert batched.pool.lanes == 64
    assert batched.pool.bytes == 64 * sum(np.prod(spec.sizes(1)) * 4 for spec in session.manifest.state)
    a_call = named(call_of(1))
    callers = 4 * sum(array.nbytes for array in a_call.values()) + 2**13  # inputs, outputs, the sampler's, objects
    assert peak < budget + 64 * callers
    assert all(request.done for request in requests)


def test_an_error_of_one_request_is_its_own(exported: Bundle) -> None:
    session = Session.open(exported.path, threads=1)
    batched = BatchedSession(session, BUDGET)

    def broken() -> Sampler:
        yield named(call_of(1))
        raise ZeroDivisionError("in the sampler")

    def stubborn() -> Sampler:
        inputs = named(call_of(1))
        outputs = yield inputs
        with pytest.raises(BundleError, match="x has shape"):
            yield inputs | {"x": inputs["x"][:, :2]}
        outputs = yield inputs
        return outputs["output"]

    good, bad, again = batched.submit(sampler(0)), batched.submit(broken()), batched.submit(stubborn(), steps=2)
    long = batched.submit(sampler(1), steps=2)
    batched.run()
    assert good.result().tobytes() == one_at_a_time(session, sampler(0)).tobytes()
    with pytest.raises(ZeroDivisionError):
        bad.result()
    with pytest.raises(StateError, match="steps=2, and this is call 3"):
        long.result()
    assert again.result().shape == (1, 4, 8, 8)
    assert batched.pool.free == batched.pool.lanes


def test_a_failing_call_is_told_to_its_requests(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    batched = BatchedSession(Session.open(exported.path, threads=1), BUDGET)

    def fail(self: Any, feeds: Mapping[str, Any]) -> Any:
        raise BundleError("out of memory")

    request = batched.submit(sampler(0))
    monkeypatch.setattr(type(batched.session.variants[0]), "run", fail)
    batched.run()
    with pytest.raises(BundleError, match="out of memory"):
        request.result()
    assert batched.pool.free == batched.pool.lanes


def test_cancelling(exported: Bundle) -> None:
    batched = BatchedSession(Session.open(exported.path, threads=1), BUDGET)
    request, other = batched.submit(sampler(0)), batched.submit(sampler(1))
    batched.step()
    with pytest.raises(StateError, match="the request isn't done"):
        request.result()
    request.cancel()
    request.cancel()
    batched.run()
    with pytest.raises(StateError, match="was cancelled"):
        request.result()
    assert other.result() is not None
    assert batched.pool.free == batched.pool.lanes


def test_a_sampler_without_steps(exported: Bundle) -> None:
    batched = BatchedSession(Session.open(exported.path, threads=1), BUDGET)
    assert batched.submit(sampler(0, steps=0)).result().shape == (1, 4, 8, 8)
    assert batched.step() == 0


def test_bad_requests(exported: Bundle) -> None:
    session = Session.open(exported.path, threads=1)
    batched = BatchedSession(session, BUDGET, max_batch=2)
    with pytest.raises(OptionError, match="expected a generator"):
        batched.submit(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="3 samples, and a call takes 2"):
        batched.submit(sampler(0, batch=3))
    with pytest.raises(BundleError, match="x has dtype float64"):
        batched.submit(named_as(lambda call: call | {"x": call["x"].astype(np.float64)}))
    with batched.trajectory() as trajectory:
        trajectory.run(named(call_of(2)))
        trajectory.reset()
        with pytest.raises(StateError, match="has room for batch 2, this call has 1"):
            trajectory.run(named(call_of(1)))
    assert batched.pool.free == batched.pool.lanes


def named_as(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Sampler:
    yield change(named(call_of(1)))


def test_budgets_that_are_too_small(exported: Bundle) -> None:
    session = Session.open(exported.path, threads=1)
    needs = needs_of(session.manifest)
    least = needs.lane + 8 * needs.call
    with pytest.raises(StateError, match=f"give at least {least}, a smaller max_batch"):
        BatchedSession(session, least - 1)
    assert BatchedSession(session, least, exact=False).max_batch == 1
    for options in ({"budget": 0}, {"budget": 1.5}, {"budget": BUDGET, "max_batch": 0}):
        with pytest.raises(OptionError, match="expected a whole number from 1 on"):
            BatchedSession(session, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_bundles_whose_requests_cannot_share_a_call(
    exported: Bundle, closed: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="the bundle has one batch"):
        BatchedSession.open(closed.path, BUDGET)
    session = Session.open(exported.path, threads=1)
    manifest = session.manifest

    def refused(says: str, **changes: Any) -> None:
        monkeypatch.setattr(session, "manifest", msgspec.structs.replace(manifest, **changes))
        with pytest.raises(BundleError, match=says):
            BatchedSession(session, BUDGET)
        monkeypatch.setattr(session, "manifest", manifest)

    variants = tuple(msgspec.structs.replace(variant, counts_dropped=True) for variant in manifest.variants)
    refused("experts have a capacity", variants=variants)
    refused("takes batches from 2 on", batch=(2, 4))
    monkeypatch.setattr(session, "manifest", msgspec.structs.replace(manifest, batch=(1, 4)))
    assert BatchedSession(session, BUDGET).max_batch == 4
    state = (msgspec.structs.replace(manifest.state[0], shape=(64, 16)), *manifest.state[1:])
    refused("doesn't depend on the batch", state=state)
    state = (msgspec.structs.replace(manifest.state[0], shape=("batch", "4*batch")), *manifest.state[1:])
    refused("can't be cut into samples", state=state)
    monkeypatch.setattr(session.runtime, "device", "cuda")
    with pytest.raises(BundleError, match="keeps state on its device"):
        BatchedSession(session, BUDGET)


def test_kernels_whose_bits_depend_on_the_batch_are_refused(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session.open(exported.path, threads=1)
    run = type(session.variants[0]).run

    def rounds_otherwise(self: Any, feeds: Mapping[str, Any]) -> list[Any]:
        values = run(self, feeds)
        array = values[0].numpy()
        return [array * np.float32(1 + 2e-7 * (len(array) > 1)), *values[1:]]

    monkeypatch.setattr(type(session.variants[0]), "run", rounds_otherwise)
    monkeypatch.setattr(session.runtime, "numpy", lambda v: v if isinstance(v, np.ndarray) else v.numpy())
    with pytest.raises(BundleError, match="other bits in a batch of 2 than alone"):
        BatchedSession(session, BUDGET)
    batched = BatchedSession(session, BUDGET, exact=False)
    requests = [batched.submit(sampler(seed)) for seed in range(2)]
    batched.run()
    assert all(request.done for request in requests)


def test_the_cheap_come_first_but_nobody_waits_for_ever() -> None:
    waiting = [Waiting("full", 9.0, 1, 0), Waiting("cheap", 1.0, 2, 0), Waiting("full", 9.0, 1, 0)]
    assert cheap_first(waiting, 8) == [1]
    assert cheap_first([waiting[0], waiting[2]], 8) == [0, 1]
    assert cheap_first([waiting[0], waiting[2]], 1) == [0]
    assert oldest_first(waiting, 8) == [0, 2]
    patient = waiting[0]._replace(passed=PATIENCE)
    assert cheap_first([patient, *waiting[1:]], 8) == [0, 2]


def test_lanes_of_a_pool(exported: Bundle) -> None:
    pool = StatePool((), (), 6, 2, zeros)
    assert [pool.take(count) for count in (2, 3, 2, 1)] == [0, 2, None, 5]
    pool.give_back(2, 3)
    pool.give_back(5, 1)
    assert pool.take(4) == 2


def test_neighbors_are_joined_without_a_copy() -> None:
    memory = np.arange(12.0).reshape(6, 2)
    together = joined([memory[1:2], memory[2:4]], 0)
    assert np.shares_memory(together, memory)
    assert (together == memory[1:4]).all()
    apart = joined([memory[1:2], memory[3:4]], 0)
    assert not np.shares_memory(apart, memory)
    assert (joined([memory[:, :1], memory[:, 1:]], 1) == memory).all()


@pytest.mark.slow
def test_an_output_that_is_cached_as_a_whole(tmp_path: Path) -> None:
    bundle = moeca.export(small_model(), call_of(2), "uniform:3", tmp_path / "b", granularity="output")
    session = Session.open(bundle.path, threads=1)
    batched = BatchedSession(session, BUDGET)
    requests = []
    for seed in range(5):
        requests.append(batched.submit(sampler(seed)))
        batched.step()
    batched.run()
    for seed, request in enumerate(requests):
        assert request.result().tobytes() == one_at_a_time(session, sampler(seed)).tobytes()
