"""`trajectory(model, steps, stream)`: says where a trajectory begins and ends, so that nothing has to be guessed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

from moeca_compile.engine.trajectories.blocks import Block, acting, close_block, open_block
from moeca_compile.engine.trajectories.declared_timesteps import DeclaredTimesteps
from moeca_compile.errors import MoecaWarning, StateError

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
        weights: ids of the model's parameters and buffers; empty: any model.
        steps: calls that are expected (per stream); one more is refused.
        timesteps: those of the calls, where they are known.
        frozen: the model's handle, if it isn't touched while the trajectory lasts.
        states: of each handle that it runs, by the handle's runtime.
        ways: where it is frozen, what is known of each kind of call.
        seen: calls of the model's graphs in it.
        unseen: calls of the model that ran none.
        if_empty: asked when it is left without any call: what to warn of, if anything.
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
        self.states: dict[Any, Any] = {}
        self.seen = self.unseen = 0
        self.if_empty: Callable[[], str | None] | None = None
        self._says_so = False
        self._told: list[DeclaredTimesteps] = []
        self._open: list[Block] = []

    def told(self) -> DeclaredTimesteps | None:
        """For one set of weights: the timesteps of its calls, where a named stream was told one for each call."""
        if not self.timesteps or self.stream is None or self.steps not in (None, len(self.timesteps)):
            return None
        self._told.append(DeclaredTimesteps(self.timesteps))
        return self._told[-1]

    def miss(self, says_so: bool) -> None:
        """A call of the model ran no graph: it was a step that the cache didn't see. `says_so`: when it is left."""
        self.unseen += 1
        self._says_so |= says_so
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
            block = next((one for one in reversed(self._open) if one.key == id(frame)), block)
        self._open.remove(block)
        is_here = block.is_in_context()
        later = close_block(block)
        if kind is not None:
            return
        if any(one.trajectory is not self and one.trajectory.serves(self.weights) for one in later):
            raise StateError(
                "trajectories overlap: this one was left while one entered later is still open, so calls since then "
                "went to that one. Enter a trajectory around each call of its loop, or around the whole loop"
            )
        if not (is_here or block.inside or block.outside):
            warnings.warn(
                "no call of the model was counted to a trajectory that was entered in one thread or task and left in "
                "another: a call counts where the trajectory was entered. Enter it around each call",
                MoecaWarning,
                stacklevel=2,
            )
        if self._says_so and not self._open:
            self._says_so = False
            calls = f"{self.unseen} of {self.seen + self.unseen} calls of the model in this trajectory"
            warnings.warn(f"{calls} {RAN_EAGERLY}", MoecaWarning, stacklevel=2)
        if self.if_empty is not None and is_here and not (self._open or self.seen + self.unseen):
            empty, self.if_empty = self.if_empty(), None
            if empty is not None:
                warnings.warn(empty, MoecaWarning, stacklevel=2)
        for told in self._told:
            told.settle()

    def serves(self, weights: Collection[int]) -> bool:
        """Whether a graph with these weights is the model's; a part of a broken graph may have none at all."""
        return not self.weights or not weights or not self.weights.isdisjoint(weights)
