"""The context manager that `trajectory(model, steps, stream)` returns: it marks where a trajectory begins and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

from moeca_compile.engine.trajectories.blocks import Block, acting, close_block, open_block
from moeca_compile.engine.trajectories.declared_timesteps import DeclaredTimesteps
from moeca_compile.errors import StateError, warn

RAN_EAGERLY = (
    "ran uncached, as if the model weren't compiled: torch made no graph for that kind of call (shapes, dtypes, modes, "
    "values of arguments), because it had reached its limit of graphs or compiling is turned off. "
    'TORCH_LOGS="recompiles" shows what it made so many graphs for'
)


class Trajectory:
    """A context manager that owns its cached state; enter it again to go on with it.

    With `stream` each call of the model inside is exactly one step and nothing is read from the inputs. Without it,
    streams are still told apart by timestep and conditioning, but the state is this trajectory's own.

    Attributes:
        weights: ids of the model's parameters and buffers, and of the model; empty: any model.
        steps: expected number of calls of each stream; one more is refused. None: any number.
        stream: name of the guidance stream; None: the clock finds the streams.
        timesteps: of the calls, as declared; empty: not declared.
        frozen: the model's handle, if the caller guarantees that the model doesn't change; else None.
        states: the TrajectoryState of each handle that has run, by its HandleRuntime.
        fast_calls: for a frozen trajectory, the recorded path of each kind of call.
        calls: number of calls that ran a graph of the model.
        uncached_calls: number of calls that ran no graph of the model.
        if_empty: called when the trajectory is left without any call; returns a warning, or None.
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
        self.timesteps = tuple(map(float, timesteps))
        self.frozen = frozen
        self.fast_calls: dict[Any, Any] = {}
        self.states: dict[Any, Any] = {}
        self.calls = self.uncached_calls = 0
        self.if_empty: Callable[[], str | None] | None = None
        self._warns_of_uncached = False
        self._declared: list[DeclaredTimesteps] = []
        self._open: list[Block] = []

    def declared(self) -> DeclaredTimesteps | None:
        """The declared timesteps, for the calls of one handle; None: not a named stream with one timestep a call."""
        if not self.timesteps or self.stream is None or self.steps not in (None, len(self.timesteps)):
            return None
        self._declared.append(DeclaredTimesteps(self.timesteps))
        return self._declared[-1]

    def miss(self, warn: bool) -> None:
        """Count a call of the model that ran no graph: a step that the cache missed. `warn`: warn when the trajectory
        is left."""
        self.uncached_calls += 1
        self._warns_of_uncached |= warn
        for running in list(self.states.values()):
            running.miss()

    def __enter__(self) -> Trajectory:
        frame = acting(sys._getframe(1))
        if self._open and not any(block.holds(frame) for block in self._open):
            raise StateError(
                "this trajectory is in use in another thread, task or generator: make one trajectory a thread and "
                "stream"
            )
        self._open.append(open_block(self, frame))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._open:
            raise StateError("this trajectory was left more often than entered")
        frame = acting(sys._getframe(1))
        block = self._open[-1]
        if block.key != id(frame):
            block = next((entered for entered in reversed(self._open) if entered.key == id(frame)), block)
        self._open.remove(block)
        is_here = block.is_in_context()
        overlapping = close_block(block)
        if kind is not None:
            return
        if any(other.trajectory is not self and other.trajectory.serves(self.weights) for other in overlapping):
            raise StateError(
                "trajectories overlap: this one was left while one entered later is still open, so calls since then "
                "went to that one. Enter a trajectory around each call of its loop, or around the whole loop"
            )
        if not (is_here or block.inside or block.outside):
            warn(
                "no call of the model was counted to a trajectory that was entered in one thread or task and left in "
                "another: a call counts where the trajectory was entered. Enter it around each call"
            )
        all_calls = self.calls + self.uncached_calls
        if self._warns_of_uncached and not self._open:
            self._warns_of_uncached = False
            count = f"{self.uncached_calls} of {all_calls} calls of the model in this trajectory"
            warn(f"{count} {RAN_EAGERLY}")
        if self.if_empty is not None and is_here and not (self._open or all_calls):
            warning, self.if_empty = self.if_empty(), None
            if warning is not None:
                warn(warning)
        for timesteps in self._declared:
            timesteps.check()

    def serves(self, weights: Collection[int]) -> bool:
        """Whether a graph with these weights is the model's; a part of a broken graph may have no weights at all."""
        return not self.weights or not weights or not self.weights.isdisjoint(weights)
