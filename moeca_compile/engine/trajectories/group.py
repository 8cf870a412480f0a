"""The trajectories of one handle, or of handles that are compiled together: two transformers of one sampling loop."""

from __future__ import annotations

import threading
import weakref

from moeca_compile.engine.hoisted import TimestepHistory
from moeca_compile.engine.trajectory_state import RecordHistory, TrajectoryState


class TrajectoryGroup:
    """The trajectories that the calls of some handles belong to. A trajectory counts the steps of all of them.

    Args:
        latent_jump: of the clock, for calls outside any trajectory.
        hands_over: a model's first step in a trajectory uses the state of the model before it.

    Attributes:
        timestep_history: timesteps of the last trajectory.
        history: records of the trajectories since the last reset.
        outside: state of calls outside any trajectory.
        latest: state of the latest trajectory, which `stats` reports.
        alive: states of all trajectories that are alive.
        lock: protects `latest` and `alive`.
    """

    def __init__(self, latent_jump: float, hands_over: bool = False) -> None:
        self.latent_jump, self.hands_over = latent_jump, hands_over
        self.timestep_history = TimestepHistory()
        self.history = RecordHistory()
        self.outside = TrajectoryState(None, latent_jump, self.timestep_history, self.history, hands_over)
        self.latest = self.outside
        self.alive: weakref.WeakSet[TrajectoryState] = weakref.WeakSet((self.outside,))
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type[TrajectoryGroup], tuple[float, bool]]:
        """Copies of the handles have trajectories of their own."""
        return TrajectoryGroup, (self.latent_jump, self.hands_over)

    def states(self) -> list[TrajectoryState]:
        """The states of all trajectories that are alive."""
        with self.lock:
            return list(self.alive)

    def forget(self) -> None:
        """Drop all state in every trajectory: the next call of each stream is cold. The clocks go on."""
        for running in self.states():
            running.forget()

    def reset(self) -> None:
        """Drop all state and records, in every trajectory."""
        self.history.clear()
        for running in self.states():
            running.reset()
