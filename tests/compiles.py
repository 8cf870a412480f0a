"""Counts what is traced and compiled, for tests of `dynamic=True`."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def in_place_of_inductor(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Compile nothing: whether each graph was to be compiled with symbols, which go through every node of it."""
    seen: list[bool] = []

    def as_it_stands(options: Any, gm: Any, args: Any, mode: Any) -> Any:
        seen.append(mode is not None)
        if mode is not None:
            with mode:
                gm(*args)
        return gm

    monkeypatch.setattr("moeca_compile.lowering.inductor.lower._compiled", as_it_stands)
    return seen


def traces() -> int:
    """How often Dynamo has traced a function in this process."""
    return len(torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", []))
