"""Sampling loops as generators that hold a trajectory open: in turn, and resumed by other threads and contexts."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.errors import StateError
from tests.sampling import TIMES, Loop, plain, run, same, take_turns

WAYS: dict[str, dict[str, Any]] = {"unnamed": {}, "named": {"stream": "only"}, "frozen": {"frozen": True}}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def previews(model: nn.Module, way: dict[str, Any], seed: int = 0, calls: int = len(TIMES)) -> Loop:
    with moeca.trajectory(model, calls, **way):
        yield from plain(model, seed=seed, times=TIMES[:calls])


@ways
def test_loops_that_take_turns_each_go_on_with_their_own(model: nn.Module, way: dict[str, Any]) -> None:
    sizes = ((0, 10), (1, 6), (2, 8))
    alone = [run(previews(model, way, *size)) for size in sizes]
    for order in ([0, 1], [0, 1, 2, 2, 1, 1, 0], [2, 0, 1]):
        found = take_turns([previews(model, way, *size) for size in sizes], order)
        assert all(same(*pair) for pair in zip(found, alone, strict=True))


@ways
def test_a_loop_that_is_resumed_by_other_threads_and_contexts(model: nn.Module, way: dict[str, Any]) -> None:
    def resume(loop: Loop) -> list[torch.Tensor]:
        return contextvars.copy_context().run(run, loop, 1)

    alone = [run(previews(model, way, seed)) for seed in (0, 1)]
    loops = [previews(model, way, seed) for seed in (0, 1)]
    found: list[list[torch.Tensor]] = [[], []]
    pools = [ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) for _ in range(3)]
    for step in range(len(TIMES) + 1):
        for i, loop in enumerate(loops):
            found[i] += pools[(step + i) % 3].submit(resume, loop).result()
    assert all(same(*pair) for pair in zip(found, alone, strict=True))


@ways
def test_a_call_between_the_steps_of_a_loop_is_not_in_its_trajectory(model: nn.Module, way: dict[str, Any]) -> None:
    alone = run(previews(model, way))
    loop = previews(model, way)
    found = run(loop, 3)
    other = run(plain(model, seed=5))
    assert same(found + run(loop), alone)
    moeca.reset(model)
    assert same(other, run(plain(model, seed=5)))


def _steps(model: nn.Module) -> Loop:
    """One that leaves the calls to others."""
    with moeca.trajectory(model):
        yield from (torch.tensor(time) for time in TIMES)


def test_calls_that_may_belong_to_either_of_two_are_refused_before_they_run(model: nn.Module) -> None:
    loops = [_steps(model), _steps(model)]
    for loop in loops:
        next(loop)
    call: Callable[[], Any] = lambda: run(plain(model), 1)  # noqa: E731
    with pytest.raises(StateError, match="may belong to either"):
        call()
    loops.pop().close()
    call()
    assert len(moeca.stats(model).steps) == 1
