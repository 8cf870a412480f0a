"""The C++ compiler is asked while the model is captured: once, in the background, and never in anyone's way."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch._inductor import cpu_vec_isa

from moeca_compile.lower.ahead import ask_compiler
from tests.sampling import compiled, dit, plain, run


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    ask_compiler.cache_clear()
    yield
    ask_compiler.cache_clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that asked."""
    found: list[str] = []
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: found.append(threading.current_thread().name))
    return found


def test_it_is_asked_once_and_in_the_background(asked: list[str]) -> None:
    assert ask_compiler() is ask_compiler()
    ask_compiler().join()
    assert asked == ["moeca asks g++"]


def test_what_goes_wrong_is_for_inductor_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no C++ compiler")

    caught: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", caught.append)
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", fail)
    ask_compiler().join()
    assert not caught


def test_who_compiles_nothing_asks_nothing(asked: list[str]) -> None:
    torch._dynamo.reset()
    run(plain(compiled(dit(), inner="eager")), 2)
    assert ask_compiler.cache_info().currsize == 0
    assert asked == []
