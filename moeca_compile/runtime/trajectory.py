"""`trajectory(model, steps, stream)`: says where a trajectory begins and ends, so that nothing has to be guessed."""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from moeca_compile.errors import StateError
from moeca_compile.runtime.told import Told

# entered now, innermost last; a context variable, so that threads and asyncio tasks each see their own
_active: ContextVar[tuple[Trajectory, ...]] = ContextVar("moeca_trajectories", default=())


class Trajectory:
    """A context manager that owns its cached state; enter it again to go on with it.

    With `stream` each call of the model inside is exactly one step and nothing is read from the inputs. Without it,
    streams are still told apart by timestep and conditioning, but the state is this trajectory's own.

    Attributes:
        weights: ids of the model's parameters and buffers; empty: any model.
        steps: calls that are expected (per stream); one more is refused.
        timesteps: those of the calls, where they are known.
        frozen: the model's handle, if it isn't touched while the trajectory lasts.
        tracks: runtime state by set of weights, filled by the dispatcher.
        ways: where it is frozen, what is known of each kind of call.
    """

    def __init__(
        self,
        weights: Collection[int],
        steps: int | None = None,
        stream: str | None = None,
        timesteps: Collection[float] = (),
        frozen: object = None,
    ) -> None:
        if steps is not None and steps < 1:
            raise StateError(f"trajectory: steps={steps}, expected at least 1")
        self.weights = frozenset(weights)
        self.steps = steps
        self.stream = stream
        self.timesteps = tuple(float(one) for one in timesteps)
        self.frozen = frozen
        self.ways: dict[Any, Any] = {}
        self.tracks: dict[Any, Any] = {}
        self._told: list[Told] = []
        self._thread: int | None = None

    def told(self) -> Told | None:
        """For one set of weights: the timesteps of its calls, where a named stream was told one for each call."""
        if not self.timesteps or self.stream is None or self.steps not in (None, len(self.timesteps)):
            return None
        self._told.append(Told(self.timesteps))
        return self._told[-1]

    def __enter__(self) -> Trajectory:
        here = threading.get_ident()
        if self._thread not in (None, here):
            raise StateError("this trajectory is in use in another thread: make one trajectory a thread and stream")
        self._thread = here
        _active.set((*_active.get(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stack = _active.get()
        last = len(stack) - 1 - stack[::-1].index(self)
        _active.set(stack[:last] + stack[last + 1 :])
        if self not in _active.get():
            self._thread = None
        if last != len(stack) - 1 and kind is None:
            raise StateError(
                "trajectories overlap: this one was left while one entered later is still open, so calls since then "
                "went to that one. Enter a trajectory around each call of its loop, or around the whole loop"
            )
        if kind is None:
            for told in self._told:
                told.settle()

    def serves(self, weights: Collection[int]) -> bool:
        """Whether a graph with these weights is the model's; a part of a broken graph may have none at all."""
        return not self.weights or not weights or not self.weights.isdisjoint(weights)


def current(weights: Collection[int]) -> Trajectory | None:
    """The innermost trajectory entered in this thread (or task) for a model with one of these weights."""
    return next((one for one in reversed(_active.get()) if one.serves(weights)), None)


def innermost() -> Trajectory | None:
    """The last that was entered in this thread (or task), whatever its model."""
    return _active.get()[-1] if _active.get() else None
