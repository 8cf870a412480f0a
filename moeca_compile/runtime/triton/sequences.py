"""The trajectories that a server runs at a time, by the correlation ids of their requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moeca_compile.errors import MoecaError, StateError
from moeca_compile.runtime.batched.session import BatchedSession
from moeca_compile.runtime.bundle.feeds import Arrays
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.trajectory import Trajectory


class Asked(NamedTuple):
    """A request: the next step of sequence `number`. `start` begins it anew, `end` drops its state after this step."""

    number: int
    start: bool
    end: bool
    inputs: Mapping[str, Any]


class Sequences:
    """Triton's sequences on a session's trajectories. Those of a `BatchedSession` share calls.

    Triton doesn't say when it gives up an idle sequence. So one that is idle for `idle_seconds` is dropped here too,
    and so is the one unused for longest when there would be more than `most`, which Triton never has alive.
    """

    def __init__(
        self,
        session: Session | BatchedSession,
        most: int,
        idle_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session, self.most, self.idle_seconds, self._now = session, most, idle_seconds, now
        self._open: dict[int, tuple[Trajectory, float]] = {}  # the least recently used first

    def call(self, number: int, start: bool, end: bool, inputs: Mapping[str, Any]) -> Arrays:
        """The next step of one sequence.

        Raises:
            StateError: it was never started, it ended, or it was idle for too long.
            BundleError: inputs that the model doesn't take.
        """
        (found,) = self.calls([Asked(number, start, end, inputs)])
        if isinstance(found, MoecaError):
            raise found
        return found

    def calls(self, requests: Sequence[Asked]) -> list[Arrays | MoecaError]:
        """The next step of several sequences: for each its outputs, or what is wrong with it."""
        self._drop_idle()
        found: dict[int, Arrays | MoecaError] = {}
        waiting = dict(enumerate(requests))
        while waiting:  # a sequence with two requests makes two steps
            first = {asked.number: place for place, asked in reversed(waiting.items())}
            found |= self._round({place: waiting.pop(place) for place in sorted(first.values())})
        return [found[place] for place in range(len(requests))]

    def _round(self, requests: Mapping[int, Asked]) -> dict[int, Arrays | MoecaError]:
        """One step of each of these sequences."""
        found: dict[int, Arrays | MoecaError] = {}
        steps: dict[int, tuple[Trajectory, Mapping[str, Any]]] = {}
        for place, asked in requests.items():
            try:
                steps[place] = self._trajectory(asked.number, asked.start), asked.inputs
            except MoecaError as error:
                found[place] = error
        found |= zip(steps, self._advance(list(steps.values())), strict=True)
        for asked in requests.values():
            if asked.end:
                self._drop(asked.number)
        return found

    def _advance(self, steps: Sequence[tuple[Trajectory, Mapping[str, Any]]]) -> list[Arrays | MoecaError]:
        if isinstance(self.session, BatchedSession):
            return self.session.advance(steps)
        found: list[Arrays | MoecaError] = []
        for trajectory, inputs in steps:
            try:
                found.append(trajectory.run(inputs))
            except MoecaError as error:
                found.append(error)
        return found

    def _trajectory(self, number: int, start: bool) -> Trajectory:
        """The trajectory of a sequence.

        Raises:
            StateError: it was never started, it ended, or it was idle for too long.
        """
        if start:
            self._drop(number)
            while len(self._open) >= self.most:
                self._drop(next(iter(self._open)))
            trajectory: Trajectory = self.session.trajectory(stream=str(number))
        elif number in self._open:
            trajectory, _ = self._open.pop(number)
        else:
            raise StateError(
                f"sequence {number} isn't open: its first request needs sequence_start, and one that was idle for "
                f"{self.idle_seconds:g} s is dropped"
            )
        self._open[number] = trajectory, self._now()
        return trajectory

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
