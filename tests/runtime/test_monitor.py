"""`stats` and `reset` from a monitoring thread while sampling loops run in others."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor, nn

import moeca_compile as moeca
from tests.sampling import TIMES, plain, run, same


@pytest.fixture(autouse=True)
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@contextmanager
def meanwhile(call: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Another thread makes the call over and over again; what it raised."""
    errors: list[BaseException] = []
    done = threading.Event()

    def body() -> None:
        while not done.is_set() and not errors:
            try:
                call()
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield errors
    finally:
        done.set()
        thread.join()


def loops(model: nn.Module) -> list[list[Tensor]]:
    found = []
    for batch in (2, 3):
        with moeca.trajectory(model, steps=len(TIMES)):
            found.append(run(plain(model, batch=batch)))
    return found


@pytest.mark.slow
def test_stats_may_be_asked_for_at_any_moment(model: nn.Module) -> None:
    truth = loops(model)
    with meanwhile(lambda: str(moeca.stats(model))) as errors:
        found = loops(model)
    assert not errors
    assert all(same(*pair) for pair in zip(found, truth, strict=True))


@pytest.mark.slow
def test_reset_may_come_at_any_moment(model: nn.Module) -> None:
    truth = loops(model)
    with meanwhile(lambda: moeca.reset(model)) as errors:
        loops(model)
    assert not errors
    assert all(same(*pair) for pair in zip(loops(model), truth, strict=True))
