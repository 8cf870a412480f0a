"""What is asked of a batched session: denoising loops, and their steps that wait for a call."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any, Protocol

from moeca_compile.errors import StateError

Sampler = Generator[Any, Any, Any]  # yields a step's inputs, is sent its outputs, returns the result


class Planned(Protocol):
    """A step before it runs: the variant's name, and its multiply-accumulates for one sample."""

    @property
    def name(self) -> str: ...
    @property
    def macs(self) -> float: ...


class Loop(Protocol):
    """A denoising loop whose state is in a pool.

    Attributes:
        lanes: the first lane, and how many; None: it has none yet, or none any more.
    """

    lanes: tuple[int, int] | None

    def plan(self, inputs: Any) -> Planned:
        """Find what the next step runs. Nothing is kept until `commit`: a step may be planned again."""

    def commit(self, planned: Any, values: Any, ms: float) -> Any:
        """Keep what a planned step wrote, and return its outputs."""

    def close(self) -> None:
        """Drop the state and give the lanes back."""


class Request:
    """A sampler that a batched session runs.

    Attributes:
        trajectory: its denoising loop; `trajectory.records` tells the steps.
        done: whether it ended, with a result or an error.
    """

    def __init__(self, sampler: Sampler, trajectory: Loop) -> None:
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
        trajectory: whose step it is, a `Loop`.
        inputs: of the model.
        batch: number of samples.
        request: whose sampler goes on after it; None: a thread waits for it.
        since: `time.monotonic()` when it came, in seconds.
        planned: what it runs; None: its trajectory has no lanes yet.
        passed: how many calls were made while it waited.
        outputs, error: how it ended.
    """

    def __init__(self, trajectory: Any, inputs: Any, batch: int, request: Request | None) -> None:
        self.trajectory, self.inputs, self.batch, self.request = trajectory, inputs, batch, request
        self.since, self.passed = time.monotonic(), 0
        self.planned: Any = None  # a `Planned`
        self.outputs: Any = None
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether it was part of a call, or can't be."""
        return self.outputs is not None or self.error is not None
