"""The C++ compiler is asked while the model is captured: once, in the background, and never in anyone's way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor import config
from torch._inductor.codecache import CppPythonBindingsCodeCache

import moeca_compile as moeca
from moeca_compile.lowering.inductor.ahead import KERNEL, ask_compiler, compiles_on_cpu
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
    _compiler_is(monkeypatch, lambda *given: found.append(threading.current_thread().name))
    return found


def _compiler_is(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding", load)


def test_it_is_asked_once_and_in_the_background(asked: list[str]) -> None:
    assert ask_compiler() is ask_compiler()
    ask_compiler().join()
    assert asked == ["moeca asks g++"]


def test_what_goes_wrong_is_for_inductor_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("no C++ compiler")

    caught: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", caught.append)
    _compiler_is(monkeypatch, fail)
    ask_compiler().join()
    assert not caught


@pytest.mark.slow
def test_who_compiles_nothing_asks_nothing(asked: list[str]) -> None:
    torch._dynamo.reset()
    run(plain(compiled(dit(), inner="eager")), 2)
    moeca.compile(dit(), inner="eager")
    moeca.compile(dit().to("meta"))
    assert ask_compiler.cache_info().currsize == 0
    assert asked == []


def test_compile_asks_before_the_model_is_called(asked: list[str]) -> None:
    moeca.compile(dit())
    ask_compiler().join()
    assert asked == ["moeca asks g++"]


def test_the_kernel_is_one_that_inductor_compiles() -> None:
    out = torch.zeros(1)
    CppPythonBindingsCodeCache.load_pybinding(["float*"], KERNEL)(out)
    assert out.item() == 1


def test_the_users_options_of_inductor_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    _compiler_is(monkeypatch, lambda *given: heard.append(config.cpp.simdlen))
    with config.patch({"cpp.simdlen": 256}):
        ask_compiler().join()
    assert heard == [256]


def test_a_graph_is_the_cpus_if_all_its_tensors_are() -> None:
    assert compiles_on_cpu([torch.zeros(1), 3, None])
    assert not compiles_on_cpu([torch.zeros(1), torch.zeros(1, device="meta")])
    assert not compiles_on_cpu([3])
