"""`trajectory`: who is in it, when, and in which thread or task."""

from __future__ import annotations

import asyncio
import threading

import pytest

from moeca_compile.errors import StateError
from moeca_compile.runtime.trajectory import Trajectory, current

MODEL, OTHER = {1, 2}, {3}


def test_nothing_is_current_outside() -> None:
    with Trajectory(MODEL):
        pass
    assert current(MODEL) is None


def test_it_serves_its_own_model_only() -> None:
    with Trajectory(MODEL) as mine:
        assert current({2, 9}) is mine
        assert current(OTHER) is None


def test_one_without_weights_serves_any_model() -> None:
    with Trajectory(()) as one:
        assert current(OTHER) is one


def test_the_innermost_one_of_a_model_is_current() -> None:
    with Trajectory(MODEL) as outer:
        with Trajectory(OTHER), Trajectory(MODEL) as inner:
            assert current(MODEL) is inner
        assert current(MODEL) is outer


def test_it_can_be_entered_again_one_time_after_the_other_and_inside_itself() -> None:
    one = Trajectory(MODEL)
    for _ in range(2):
        with one, one:
            assert current(MODEL) is one
        assert current(MODEL) is None


def test_it_is_left_when_its_loop_raises() -> None:
    with pytest.raises(KeyError), Trajectory(MODEL):
        raise KeyError
    assert current(MODEL) is None


def test_steps_below_one_are_refused() -> None:
    with pytest.raises(StateError, match="at least 1"):
        Trajectory(MODEL, steps=0)


def test_overlapping_ones_are_refused_when_the_first_is_left() -> None:
    """Two generators that hold their `with` open across a yield: the calls of one would go to the other."""
    first, second = Trajectory(MODEL), Trajectory(MODEL)
    first.__enter__()
    second.__enter__()
    with pytest.raises(StateError, match="around each call"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert current(MODEL) is None


def test_another_thread_sees_none_of_it() -> None:
    seen: list[Trajectory | None] = []
    with Trajectory(MODEL):
        thread = threading.Thread(target=lambda: seen.append(current(MODEL)))
        thread.start()
        thread.join()
    assert seen == [None]


def test_it_is_refused_in_a_second_thread_until_it_was_left() -> None:
    one, errors = Trajectory(MODEL), []

    def enter() -> None:
        try:
            with one:
                pass
        except StateError as error:
            errors.append(str(error))

    def in_thread() -> None:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    with one:
        in_thread()
    assert "another thread" in errors[0]
    in_thread()
    assert len(errors) == 1


def test_asyncio_tasks_that_take_turns_each_see_their_own() -> None:
    async def loop(one: Trajectory) -> list[bool]:
        with one:
            seen = []
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(current(MODEL) is one)
            return seen

    async def both() -> list[list[bool]]:
        return await asyncio.gather(loop(Trajectory(MODEL)), loop(Trajectory(MODEL)))

    assert asyncio.run(both()) == [[True] * 3] * 2
