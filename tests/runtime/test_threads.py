"""Several threads, one model: each has its own trajectory, or is told to; results never mix."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import StateError
from moeca_compile.ops import experts as ops
from tests.sampling import TIMES, Loop, Model, Taped, cfg_calls, dit, plain, run, same, streams, under_compile_lock

PATIENCE = 60.0  # seconds until a test gives up waiting


def threads(count: int, name: str = "") -> ThreadPoolExecutor:
    """OpenMP's thread count belongs to a thread, and Dynamo guards on it: else each would compile for itself."""
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))


@contextmanager
def paused_in_the_middle(thread_body: Callable[[], object]) -> Iterator[ThreadPoolExecutor]:
    """A thread runs `thread_body` and stands still inside its first variant, at its experts, while the `with` block
    runs."""
    inside, go_on = threading.Event(), threading.Event()
    sort = ops._sort
    stopped: list[int] = []

    def sorts(idx: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
        if not stopped and threading.current_thread().name.startswith("slow"):
            stopped.append(1)
            inside.set()
            assert go_on.wait(PATIENCE)
        return sort(idx, num_experts)

    with pytest.MonkeyPatch.context() as patch, threads(1, "slow") as pool:
        patch.setattr(ops, "_sort", sorts)
        future = pool.submit(thread_body)
        try:
            assert inside.wait(PATIENCE)
            yield pool
        finally:
            go_on.set()
            future.result(PATIENCE)


@pytest.mark.parametrize("batch", [2, 3])
def test_two_threads_without_trajectories_are_refused(model: nn.Module, batch: int) -> None:
    """Also where their shapes differ: they would share a clock."""
    for size in (batch, 2):  # once each, so that neither is compiled below
        run(plain(model, batch=size))
        moeca.reset(model)
    truth = under_compile_lock(model, plain)
    outputs: list[Tensor] = []
    with (
        paused_in_the_middle(lambda: outputs.extend(run(plain(model)))),
        pytest.raises(StateError, match=r"another thread.*moeca_compile\.trajectory"),
    ):
        run(plain(model, seed=1, batch=batch))
    assert same(outputs, truth)


def test_a_thread_in_a_trajectory_of_its_own_may_run_in_the_middle_of_anothers_step(model: nn.Module) -> None:
    truths = [run(plain(model, seed=seed)) for seed in (0, 1)]
    outputs: list[Tensor] = []

    def slow() -> None:
        with moeca.trajectory(model):
            outputs.extend(run(plain(model)))

    with paused_in_the_middle(slow), moeca.trajectory(model):
        assert same(run(plain(model, seed=1)), truths[1])
    assert same(outputs, truths[0])


def test_a_trajectory_can_not_be_shared_by_two_threads(model: nn.Module) -> None:
    one = moeca.trajectory(model, stream="only")
    run(plain(model, times=TIMES[:3]))

    def slow() -> None:
        with one:
            run(plain(model))

    with paused_in_the_middle(slow), pytest.raises(StateError, match="one trajectory a thread"):
        one.__enter__()


@pytest.mark.parametrize("loop", [plain, cfg_calls])
def test_threads_with_named_streams_never_mix(model: nn.Module, loop: Callable[..., Loop]) -> None:
    truths = [run(loop(model, seed=seed, enter=streams(model))) for seed in range(4)]

    def work(seed: int) -> list[Tensor]:
        return run(loop(model, seed=seed, enter=streams(model)))

    for _ in range(3):
        with threads(4) as pool:
            assert all(same(*pair) for pair in zip(pool.map(work, range(4)), truths, strict=True))


def test_threads_without_trajectories_are_right_or_refused(model: nn.Module, full: nn.Module, twin: nn.Module) -> None:
    """No gate here: whichever calls get through, each is exact or a forecast of its own loop."""
    tapes: list[Taped] = []

    def work(seed: int) -> None:
        tapes.append(Taped(_stubborn(model)))
        run(plain(tapes[-1], seed=seed, times=TIMES[:1]))

    with threads(4) as pool:
        list(pool.map(work, range(8)))
    assert len(tapes) == 8
    assert all(tape.equals(full) for tape in tapes)


def _stubborn(model: Model) -> Model:
    """Calls again when it is refused."""

    def call(*inputs: Tensor) -> Tensor:
        while True:
            try:
                return model(*inputs)
            except StateError:
                continue

    return call


@pytest.mark.slow
def test_threads_that_meet_an_unprepared_model_are_all_right() -> None:
    """The first one prepares it, while others are in the middle of the old code."""
    module = dit(5)
    eager = run(plain(module, times=TIMES[:1]))
    model = torch.compile(module, backend="moeca", options={"schedule": "full", "inner": "eager"})

    def work(_: int) -> list[Tensor]:
        with moeca.trajectory(model):
            return [out for _ in range(3) for out in run(plain(model, times=TIMES[:1]))]

    with threads(3) as pool:
        for outputs in pool.map(work, range(3)):
            for out in outputs:
                torch.testing.assert_close(out, eager[0])
