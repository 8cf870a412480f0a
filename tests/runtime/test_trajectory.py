"""`trajectory`: who is in it, when, and in which thread or task."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType

import pytest

from moeca_compile.engine.trajectories.blocks import current
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.errors import MoecaWarning, StateError

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


def test_child_threads_and_tasks_see_their_parents() -> None:
    async def look() -> bool:
        return current(MODEL) is not None

    async def parent() -> list[bool]:
        with Trajectory(MODEL) as one:
            seen = [await asyncio.to_thread(lambda: current(MODEL) is one), await asyncio.create_task(look())]
            late = asyncio.create_task(asyncio.sleep(0.01))
            late.add_done_callback(lambda _: seen.append(current(MODEL) is None))
        await late
        await asyncio.sleep(0)
        return seen

    assert asyncio.run(parent()) == [True] * 3


# -- generators -------------------------------------------------------------------------------------------------------


def sampler(one: Trajectory, steps: int = 3) -> Iterator[Trajectory | None]:
    """Yields whose each of its calls is."""
    with one:
        for _ in range(steps):
            yield current(MODEL)


def in_new_context(call: Callable[[], object]) -> None:
    contextvars.copy_context().run(call)


def in_new_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def in_this_one(call: Callable[[], object]) -> None:
    call()


WHERE = pytest.mark.parametrize("where", [in_new_context, in_new_thread])


@WHERE
def test_a_generator_s_calls_are_its_own_wherever_it_is_resumed(where: Callable[[Callable[[], object]], None]) -> None:
    one, seen = Trajectory(MODEL), list[Trajectory | None]()
    generator = sampler(one)
    for _ in range(4):
        where(lambda: seen.extend([next(generator)] if len(seen) < 3 else generator))
    assert seen == [one] * 3
    with one:  # it was left
        assert current(MODEL) is one


def test_generators_that_take_turns_each_have_their_own() -> None:
    mine = [Trajectory(MODEL) for _ in range(3)]
    loops = [sampler(one, steps) for one, steps in zip(mine, (3, 2, 4), strict=True)]
    for _ in range(5):
        for one, loop in zip(mine, loops, strict=True):
            assert next(loop, one) is one
    assert current(MODEL) is None


def test_what_calls_between_a_generator_s_steps_is_not_in_its_trajectory() -> None:
    with Trajectory(MODEL) as outer:
        for inner in sampler(Trajectory(MODEL)):
            assert inner is not outer
            assert current(MODEL) is outer
    loop = sampler(Trajectory(MODEL))
    next(loop)
    assert current(MODEL) is None


def test_a_block_inside_a_generator_s_step_is_nearer() -> None:
    def nested(one: Trajectory) -> Iterator[bool]:
        def step() -> bool:
            with Trajectory(MODEL) as own:
                return current(MODEL) is own

        with one:
            for _ in range(2):
                yield step() and current(MODEL) is one

    loop, seen = nested(Trajectory(MODEL)), list[bool]()
    for _ in range(2):
        in_new_context(lambda: seen.append(next(loop)))
    assert seen == [True] * 2


@pytest.mark.usefixtures("own_garbage")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_suspended_generator_may_be_dropped(resumed: bool) -> None:
    one = Trajectory(MODEL)
    loop = sampler(one)
    (in_new_context if resumed else in_this_one)(partial(next, loop))
    with pytest.raises(StateError, match="another thread, task or generator"), one:
        pass
    del loop
    gc.collect()
    assert current(MODEL) is None
    with one:
        assert current(MODEL) is one


def test_a_trajectory_is_refused_in_a_second_generator() -> None:
    one = Trajectory(MODEL)
    first, second = sampler(one), sampler(one)
    next(first)
    with pytest.raises(StateError, match="make one trajectory a thread and stream"):
        next(second)
    assert list(first) == [one] * 2


def times(one: Trajectory) -> Iterator[None]:
    """A generator that leaves the calls to others."""
    with one:
        for _ in range(2):
            yield


def test_a_generator_that_makes_no_calls_lends_its_trajectory() -> None:
    one = Trajectory(MODEL)
    for _ in times(one):
        assert current(MODEL) is one
    assert current(MODEL) is None


def test_two_of_them_at_once_are_refused() -> None:
    loops = [times(Trajectory(MODEL)) for _ in range(2)]
    for loop in loops:
        next(loop)
    with pytest.raises(StateError, match="this call may belong to either"):
        current(MODEL)
    loops.pop().close()
    assert current(MODEL) is not None


def test_one_that_calls_after_others_did_is_refused() -> None:
    def late(one: Trajectory) -> Iterator[Trajectory | None]:
        with one:
            yield None
            yield current(MODEL)

    one = Trajectory(MODEL)
    loop = late(one)
    next(loop)
    assert current(MODEL) is one
    with pytest.raises(StateError, match="other code called the model"):
        next(loop)
    assert current(MODEL) is None


class Entering:
    """A class that enters a trajectory for its caller."""

    def __init__(self, one: Trajectory) -> None:
        self.one = one

    def __enter__(self) -> None:
        self.one.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.one.__exit__(kind, error, tb)


@contextmanager
def entering(one: Trajectory) -> Iterator[None]:
    with one:
        yield


@contextmanager
def stacked(one: Trajectory) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(one)
        yield


@pytest.mark.parametrize("way", [Entering, entering, stacked])
def test_helpers_enter_for_their_caller(way: Callable[[Trajectory], Entering]) -> None:
    def loop(one: Trajectory) -> Iterator[Trajectory | None]:
        with way(one):
            for _ in range(3):
                yield current(MODEL)

    one, other = Trajectory(MODEL), Trajectory(MODEL)
    with way(one), way(other):
        assert current(MODEL) is other
    pairs = zip(loop(one), loop(other), strict=True)
    in_new_context(partial(next, pairs))
    assert list(pairs) == [(one, other)] * 2


def test_async_generators_that_take_turns_in_one_task() -> None:
    async def loop(one: Trajectory) -> AsyncIterator[bool]:
        with one:
            for _ in range(3):
                here = current(MODEL) is one
                yield here and await asyncio.to_thread(lambda: current(MODEL) is one)

    async def both() -> list[bool]:
        loops = [loop(Trajectory(MODEL)) for _ in range(2)]
        seen = []
        for _ in range(3):
            for one in loops:
                seen.append(await anext(one))
                seen.append(current(MODEL) is None)
        for one in loops:
            await one.aclose()  # type: ignore[attr-defined]
        return seen

    assert all(asyncio.run(both()))


# -- entered and left by hand -----------------------------------------------------------------------------------------


def test_one_that_a_function_left_open_is_current_in_its_context() -> None:
    one = Trajectory(MODEL)
    (lambda: one.__enter__())()
    assert current(MODEL) is one
    (lambda: one.__exit__(None, None, None))()
    assert current(MODEL) is None


def test_leaving_it_once_too_often_is_refused() -> None:
    with pytest.raises(StateError, match="more often than entered"):
        Trajectory(MODEL).__exit__(None, None, None)


def test_one_that_is_left_elsewhere_without_a_call_says_so() -> None:
    one = Trajectory(MODEL)
    in_new_context(one.__enter__)
    assert current(MODEL) is None
    with pytest.warns(MoecaWarning, match=r"no call of the model was counted.*Enter it around each call"):
        one.__exit__(None, None, None)
    with one:
        assert current(MODEL) is one


def test_one_that_was_left_elsewhere_is_not_kept() -> None:
    one = Trajectory(MODEL)
    gone = weakref.ref(one)
    loop = sampler(one)
    next(loop)
    in_new_context(partial(list, loop))
    del one, loop
    assert gone() is None
