"""Declared timesteps, compared with those that came without waiting for a device; a CPU stands for the accelerator."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.engine.trajectories import declared_timesteps as told_module
from moeca_compile.engine.trajectories.declared_timesteps import DeclaredTimesteps
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.errors import StateError
from moeca_compile.graph.nowait import Flag

TIMES = (900.0, 700.0, 500.0)


def come(
    declared: DeclaredTimesteps, *values: float, first: int = 0, dtype: torch.dtype = torch.float32
) -> list[float | None]:
    arrived = [torch.full((2,), value, dtype=torch.float64).to(dtype) for value in values]
    return [declared.at(step, value) for step, value in enumerate(arrived, first)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.long])
def test_what_was_told_came(dtype: torch.dtype) -> None:
    declared = DeclaredTimesteps(TIMES)
    assert come(declared, *TIMES, dtype=dtype) == list(TIMES)
    declared.check()
    declared.check()


def test_a_value_that_the_dtype_can_not_hold_is_compared_as_it_came() -> None:
    declared = DeclaredTimesteps((899.3, 0.1))
    come(declared, 899.3, 0.1, dtype=torch.bfloat16)
    declared.check()


def test_another_timestep_is_an_error_that_names_the_call() -> None:
    declared = DeclaredTimesteps(TIMES)
    come(declared, 900.0, 701.0, 500.0)
    with pytest.raises(StateError, match="call 2 came with timestep 701, but the trajectory declared 700"):
        declared.check()
    declared.check()  # said once


def test_one_sample_of_the_batch_is_enough() -> None:
    declared = DeclaredTimesteps(TIMES)
    declared.at(0, torch.tensor([900.0, 900.0, 899.0]))
    come(declared, 700.0, first=1)
    with pytest.raises(StateError, match="call 1 came with timestep 899"):
        declared.check()


def test_what_came_is_remembered_as_it_was() -> None:
    declared, value = DeclaredTimesteps(TIMES), torch.full((2,), TIMES[0])
    for step, timestep in enumerate(TIMES):
        declared.at(step, value.fill_(timestep))
    declared.check()


def test_a_call_beyond_what_was_told_is_nobodys() -> None:
    declared = DeclaredTimesteps(TIMES)
    assert declared.at(3, torch.tensor([1.0])) is None
    assert declared.at(0, torch.empty(0)) is None
    declared.check()


class Slow(Flag):
    """A device that is still at it until it is waited for."""

    waited = 0

    def ready(self) -> bool:
        return False

    def holds(self) -> bool:
        Slow.waited += 1
        return super().holds()


def test_blocks_of_one_call_wait_after_the_last_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told_module, "Flag", Slow)
    monkeypatch.setattr(Slow, "waited", 0)
    declared = DeclaredTimesteps(TIMES)
    for step, timestep in enumerate(TIMES):
        come(declared, timestep, first=step)
        declared.check()
        assert Slow.waited == (3 if step == 2 else 0)


def test_a_block_that_ends_early_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told_module, "Flag", Slow)
    monkeypatch.setattr(Slow, "waited", 0)
    declared = DeclaredTimesteps(TIMES)
    come(declared, 700.0, 500.0)  # began at another step than was declared
    with pytest.raises(StateError, match="call 1 came with timestep 700, but the trajectory declared 900"):
        declared.check()


@pytest.mark.parametrize(
    ("stream", "steps", "timesteps", "usable"),
    [
        ("a", None, TIMES, True),
        ("a", 3, TIMES, True),
        ("a", 5, TIMES, False),  # not one a call, as with Heun's method
        ("a", 3, (), False),
        (None, 3, TIMES, False),  # calls aren't steps
    ],
)
def test_only_a_stream_with_a_timestep_a_call_can_be_taken_at_its_word(
    stream: str | None, steps: int | None, timesteps: tuple[float, ...], usable: bool
) -> None:
    assert (Trajectory((), steps, stream, timesteps).declared() is not None) == usable


def test_leaving_a_trajectory_settles_and_an_error_inside_goes_first() -> None:
    trajectory = Trajectory((), 3, "a", TIMES)
    declared = trajectory.declared()
    assert declared is not None
    with pytest.raises(StateError, match="call 1 came with timestep 1"), trajectory:
        come(declared, 1.0, 1.0)
    come(declared, 1.0, 1.0)
    with pytest.raises(ZeroDivisionError), trajectory:
        _ = 1 / 0
