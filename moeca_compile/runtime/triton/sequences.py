"""The trajectories that a server runs at a time, by the correlation ids of their requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from moeca_compile.errors import StateError
from moeca_compile.runtime.bundle.feeds import Arrays
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.trajectory import Trajectory


class Sequences:
    """Triton's sequences on a session's trajectories.

    Triton doesn't say when it gives up an idle sequence. So one that is idle for `idle_seconds` is dropped here too,
    and so is the one unused for longest when there would be more than `most`, which Triton never has alive.
    """

    def __init__(
        self, session: Session, most: int, idle_seconds: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.session, self.most, self.idle_seconds, self._now = session, most, idle_seconds, now
        self._open: dict[int, tuple[Trajectory, float]] = {}  # the least recently used first

    def call(self, number: int, start: bool, end: bool, inputs: Mapping[str, Any]) -> Arrays:
        """The next step of sequence `number`; `start` begins it anew, `end` drops its state after this step.

        Raises:
            StateError: it was never started, it ended, or it was idle for too long.
            BundleError: inputs that the model doesn't take.
        """
        self._drop_idle()
        if start:
            self._drop(number)
            while len(self._open) >= self.most:
                self._drop(next(iter(self._open)))
            trajectory = self.session.trajectory(stream=str(number))
        elif number in self._open:
            trajectory, _ = self._open.pop(number)
        else:
            raise StateError(
                f"sequence {number} isn't open: its first request needs sequence_start, and one that was idle for "
                f"{self.idle_seconds:g} s is dropped"
            )
        self._open[number] = trajectory, self._now()
        try:
            return trajectory.run(inputs)
        finally:
            if end:
                self._drop(number)

    def close(self) -> None:
        """Drop all state."""
        for number in list(self._open):
            self._drop(number)

    def __len__(self) -> int:
        return len(self._open)

    def _drop_idle(self) -> None:
        now = self._now()
        for number in [n for n, (_, used) in self._open.items() if now - used > self.idle_seconds]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        if number in self._open:
            self._open.pop(number)[0].close()
