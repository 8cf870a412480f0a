"""Timesteps at the caller's word, compared where they came without waiting; here a CPU plays the accelerator."""

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
    told: DeclaredTimesteps, *values: float, first: int = 0, dtype: torch.dtype = torch.float32
) -> list[float | None]:
    arrived = [torch.full((2,), value, dtype=torch.float64).to(dtype) for value in values]
    return [told.at(step, value) for step, value in enumerate(arrived, first)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.long])
def test_what_was_told_came(dtype: torch.dtype) -> None:
    told = DeclaredTimesteps(TIMES)
    assert come(told, *TIMES, dtype=dtype) == list(TIMES)
    told.settle()
    told.settle()


def test_a_value_that_the_dtype_can_not_hold_is_compared_as_it_came() -> None:
    told = DeclaredTimesteps((899.3, 0.1))
    come(told, 899.3, 0.1, dtype=torch.bfloat16)
    told.settle()


def test_another_timestep_is_an_error_that_names_the_call() -> None:
    told = DeclaredTimesteps(TIMES)
    come(told, 900.0, 701.0, 500.0)
    with pytest.raises(StateError, match="call 2 came with timestep 701, but the trajectory was told 700"):
        told.settle()
    told.settle()  # said once


def test_one_sample_of_the_batch_is_enough() -> None:
    told = DeclaredTimesteps(TIMES)
    told.at(0, torch.tensor([900.0, 900.0, 899.0]))
    come(told, 700.0, first=1)
    with pytest.raises(StateError, match="call 1 came with timestep 899"):
        told.settle()


def test_what_came_is_remembered_as_it_was() -> None:
    told, value = DeclaredTimesteps(TIMES), torch.full((2,), TIMES[0])
    for step, timestep in enumerate(TIMES):
        told.at(step, value.fill_(timestep))
    told.settle()


def test_a_call_beyond_what_was_told_is_nobodys() -> None:
    told = DeclaredTimesteps(TIMES)
    assert told.at(3, torch.tensor([1.0])) is None
    assert told.at(0, torch.empty(0)) is None
    told.settle()


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
    told = DeclaredTimesteps(TIMES)
    for step, timestep in enumerate(TIMES):
        come(told, timestep, first=step)
        told.settle()
        assert Slow.waited == (3 if step == 2 else 0)


def test_a_block_that_ends_early_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told_module, "Flag", Slow)
    monkeypatch.setattr(Slow, "waited", 0)
    told = DeclaredTimesteps(TIMES)
    come(told, 700.0, 500.0)  # began at another step than it was told
    with pytest.raises(StateError, match="call 1 came with timestep 700, but the trajectory was told 900"):
        told.settle()


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
    assert (Trajectory((), steps, stream, timesteps).told() is not None) == usable


def test_leaving_a_trajectory_settles_and_an_error_inside_goes_first() -> None:
    trajectory = Trajectory((), 3, "a", TIMES)
    told = trajectory.told()
    assert told is not None
    with pytest.raises(StateError, match="call 1 came with timestep 1"), trajectory:
        come(told, 1.0, 1.0)
    come(told, 1.0, 1.0)
    with pytest.raises(ZeroDivisionError), trajectory:
        _ = 1 / 0
