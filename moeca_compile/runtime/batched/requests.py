"""What is asked of a batched session: denoising loops, and their steps that wait for a call."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

from moeca_compile.errors import StateError
from moeca_compile.runtime.batched.pool import PooledState
from moeca_compile.runtime.bundle.feeds import Arrays
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.trajectory import PlannedStep, Trajectory, state_layout

if TYPE_CHECKING:
    from moeca_compile.runtime.batched.session import BatchedSession

Sampler = Generator[Mapping[str, Any], Arrays, Any]  # yields a step's inputs, is sent its outputs, returns the result


class PooledTrajectory(Trajectory):
    """A denoising loop whose state is in a batched session's pool and whose steps share calls.

    `run` waits until its step was part of a call. So each of several trajectories needs a thread of its own.

    Attributes:
        lanes: the first lane, and how many; None: it has none yet, or none any more.
    """

    def __init__(self, owner: BatchedSession, steps: int | None, stream: str) -> None:
        super().__init__(owner.session, steps, stream)
        self._owner = owner
        self.lanes: tuple[int, int] | None = None

    def close(self) -> None:
        """Give the lanes back and refuse further calls."""
        super().close()
        self._owner.leave(self)

    def _run(self, inputs: Mapping[str, Any]) -> Arrays:
        return self._owner.serve(self, inputs)

    def _new_state(self, batch: int) -> StreamState:
        assert self.lanes is not None  # a step is planned when its trajectory has lanes
        first, count = self.lanes
        if batch != count:
            raise StateError(f"the trajectory has room for batch {count}, this call has {batch}: open another one")
        return PooledState(state_layout(self.session.manifest, batch), self._owner.pool, first, batch)


class Request:
    """A sampler that a batched session runs.

    Attributes:
        trajectory: its denoising loop; `trajectory.records` tells the steps.
        done: whether it ended, with a result or an error.
    """

    def __init__(self, sampler: Sampler, trajectory: PooledTrajectory) -> None:
        self.sampler, self.trajectory, self.done = sampler, trajectory, False
        self._result: Any = None
        self._error: Exception | None = None

    def result(self) -> Any:
        """The result of a request that is done.

        Returns:
            What the sampler returned.

        Raises:
            StateError: the request isn't done, or was cancelled. What the sampler raised is raised as it is.
        """
        if not self.done:
            raise StateError("the request isn't done: call the batched session's step() or run() first")
        if self._error is not None:
            raise self._error
        return self._result

    def cancel(self) -> None:
        """End the request: its lanes are free for others. For the thread that runs the session's calls."""
        if not self.done:
            self.sampler.close()
            self.end(error=StateError("the request was cancelled"))

    def end(self, result: Any = None, error: Exception | None = None) -> None:
        """The sampler is at its end."""
        self._result, self._error, self.done = result, error, True
        self.trajectory.close()


class Step:
    """A step that waits for a call.

    Attributes:
        trajectory: whose step it is.
        inputs: arrays by name.
        batch: number of samples.
        request: whose sampler goes on after it; None: a thread waits for it.
        since: `time.monotonic()` when it came, in seconds.
        planned: what it runs; None: its trajectory has no lanes yet.
        passed: how many calls were made while it waited.
        outputs, error: how it ended.
    """

    def __init__(self, trajectory: PooledTrajectory, inputs: Mapping[str, Any], batch: int, request: Request | None):
        self.trajectory, self.inputs, self.batch, self.request = trajectory, inputs, batch, request
        self.since, self.passed = time.monotonic(), 0
        self.planned: PlannedStep | None = None
        self.outputs: Arrays | None = None
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether it was part of a call, or can't be."""
        return self.outputs is not None or self.error is not None
