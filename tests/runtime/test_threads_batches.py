"""Eight threads with trajectories of their own, whose batches change: bit for bit what each gives by itself."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from tests.models import DiT
from tests.sampling import TIMES, dit, plain, run, same

WAYS: dict[str, dict[str, Any]] = {"unnamed": {}, "named": {"stream": "only"}, "frozen": {"frozen": True}}
THREADS, BATCHES = 8, (1, 2, 3)


def dense(seed: int = 0) -> nn.Module:
    """Without experts: nothing has to be prepared."""
    torch.manual_seed(seed)
    module = DiT("numpy", depth=1, num_experts=3, shared=False)
    for block in module.blocks:
        block.moe = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    return module.eval().requires_grad_(False)


MODELS: dict[str, Callable[[], nn.Module]] = {"dense": dense, "experts": dit}


def compiled(module: nn.Module) -> nn.Module:
    return moeca.compile(module, schedule="uniform:3", inner="eager")


def sample(model: nn.Module, way: dict[str, Any], seed: int, batch: int, steps: int) -> list[Tensor]:
    with moeca.trajectory(model, steps, **way):
        return run(plain(model, seed=seed, batch=batch, times=TIMES[:steps]))


def in_threads(work: Callable[[int], None], count: int = THREADS) -> None:
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        torch.set_num_threads(1)
        together.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    together = threading.Barrier(count)
    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not errors, errors


def wrong(
    model: nn.Module, serial: nn.Module, way: str, each: int, steps: int, count: int = THREADS
) -> list[tuple[int, int]]:
    """(thread, batch) of the trajectories in threads that didn't give what `serial` gives in one thread; the first
    calls of `model` are among them."""
    torch._dynamo.reset()
    found: list[tuple[tuple[int, int], list[Tensor]]] = []

    def work(number: int) -> None:
        for i in range(each):
            key = number, BATCHES[(number + i) % len(BATCHES)]
            found.append((key, sample(model, WAYS[way], *key, steps)))

    in_threads(work, count)
    truth = {key: sample(serial, WAYS[way], *key, steps) for key in {key for key, _ in found}}
    return [key for key, outputs in found if not same(outputs, truth[key])]


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) for way in ("unnamed", "named", "frozen")])
def test_each_thread_gets_what_it_gets_by_itself(way: str) -> None:
    model = compiled(dit())
    assert wrong(model, model, way, each=2, steps=4) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_a_hundred_and_sixty_trajectories(kind: str, way: str) -> None:
    module = MODELS[kind]()
    serial = compiled(copy.deepcopy(module))
    assert wrong(compiled(module), serial, way, each=20, steps=10) == []


@pytest.mark.slow  # tests/runtime/test_threads.py has a quick one
@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_threads_that_meet_an_unprepared_model_at_once(way: str) -> None:
    """Each of their first calls is the first step of its trajectory, though it comes in broken parts."""
    module = dit()
    serial = compiled(copy.deepcopy(module))
    model = torch.compile(module, backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
    assert wrong(model, serial, way, each=1, steps=4, count=len(BATCHES) + 1) == []
