"""Calls in which torch runs none of the model's graphs are told; its limit of graphs is raised; locks aren't copied."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from moeca_compile.frontend import calls
from tests.sampling import compiled, dit, noise, records

LABELS, STEPS = torch.tensor([3, 3]), 6


def call(model: nn.Module, step: int, batch: int = 2) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(noise(step, batch), torch.full((batch,), 900.0 - 9 * step), LABELS[:1].expand(batch))
    return result


def steps(model: nn.Module, eager_at: int, **way: Any) -> None:
    with moeca.trajectory(model, STEPS, **way):
        for step in range(STEPS):
            with torch.compiler.set_stance("force_eager" if step == eager_at else "default"):
                call(model, step)


@pytest.mark.parametrize("way", [{}, {"stream": "only"}, {"frozen": True}], ids=["unnamed", "named", "frozen"])
def test_a_step_that_ran_eagerly_is_a_step_and_is_told_once(way: dict[str, Any]) -> None:
    model = compiled(dit())
    call(model, 0)
    late = 0 if way.get("frozen") else 2  # later ones of a frozen trajectory don't go torch's way
    with pytest.warns(
        MoecaWarning, match=rf"1 of {STEPS} calls of the model in this trajectory ran uncached.*recompil"
    ):
        steps(model, late, **way)
    if late:
        assert [one.step for one in records(model)] == [0, 1, 3, 4, 5]
    steps(model, late, **way)  # once a handle


def test_the_step_after_is_cold() -> None:
    model = compiled(dit())
    with pytest.warns(MoecaWarning, match="ran uncached"):
        steps(model, 3, stream="only")
    expected = [(0, False), (1, False), (2, False), (4, True), (5, False)]
    assert [(one.step, one.cold) for one in records(model)] == expected


def test_outside_a_trajectory_it_is_told_at_once() -> None:
    model = compiled(dit())
    call(model, 0)
    with torch.compiler.set_stance("force_eager"):
        with pytest.warns(MoecaWarning, match="a call of the compiled model ran uncached, as if"):
            call(model, 1)
        call(model, 2)


def fixed_sizes(limit: int) -> nn.Module:
    """One graph a size, and torch makes so many."""
    module = dit()
    moeca.prepare(module)
    options = {"schedule": "uniform:3", "inner": "eager"}
    model = torch.compile(module, backend="moeca", options=options, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=False):
        for batch in (1, 2, 3, 4):
            with moeca.trajectory(model):
                call(model, 0, batch)
    return model


@pytest.mark.slow
def test_more_kinds_of_calls_than_torch_s_limit_are_cached() -> None:
    assert moeca.stats(fixed_sizes(2)).graphs >= 1


@pytest.mark.slow
def test_kinds_beyond_the_raised_limit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_GRAPHS", 2)
    with pytest.warns(MoecaWarning, match="1 of 1 calls of the model in this trajectory ran uncached"):
        fixed_sizes(2)


def test_an_error_is_no_call_that_ran_eagerly() -> None:
    model = compiled(dit())
    with pytest.raises(RuntimeError), moeca.trajectory(model):
        model(noise(0, 2), torch.zeros(3), LABELS)


def test_a_copy_has_a_gate_of_its_own() -> None:
    one = calls.Gate()
    with one.lock:
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert other.lock is not one.lock
            end = other()
            calls.CALLS.last.release_gate()
            end()
