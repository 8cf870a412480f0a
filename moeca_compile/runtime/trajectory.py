"""`trajectory(model, steps, stream)`: says where a trajectory begins and ends, so that nothing has to be guessed."""

from __future__ import annotations

import threading
from collections.abc import Collection
from types import TracebackType
from typing import Any

from moeca_compile.errors import StateError

_active = threading.local()


class Trajectory:
    """A context manager that owns its cached state; enter it again to go on with it.

    With `stream` each call of the model inside is exactly one step and nothing is read from the inputs. Without it,
    streams are still told apart by timestep and conditioning, but the state is this trajectory's own.

    Attributes:
        weights: ids of the model's parameters and buffers; empty: any model.
        steps: calls that are expected (per stream); one more is refused.
        tracks: runtime state by (program), filled by the dispatcher.
    """

    def __init__(self, weights: Collection[int], steps: int | None = None, stream: str | None = None) -> None:
        if steps is not None and steps < 1:
            raise StateError(f"trajectory: steps={steps}, expected at least 1")
        self.weights = frozenset(weights)
        self.steps = steps
        self.stream = stream
        self.tracks: dict[int, Any] = {}
        self._thread: int | None = None

    def __enter__(self) -> Trajectory:
        here = threading.get_ident()
        if self._thread not in (None, here):
            raise StateError("this trajectory is in use in another thread: make one trajectory a thread and stream")
        self._thread = here
        _stack().append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _stack().remove(self)
        if self not in _stack():
            self._thread = None

    def serves(self, weights: Collection[int]) -> bool:
        return not self.weights or not self.weights.isdisjoint(weights)


def current(weights: Collection[int]) -> Trajectory | None:
    """The innermost trajectory entered in this thread for a model with one of these weights."""
    return next((one for one in reversed(_stack()) if one.serves(weights)), None)


def _stack() -> list[Trajectory]:
    if not hasattr(_active, "stack"):
        _active.stack = []
    stack: list[Trajectory] = _active.stack
    return stack
