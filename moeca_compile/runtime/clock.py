"""Which step and which stream is this call? Decided outside the graph, from what a call shows. No torch here.

A call goes on with the trajectory if its timestep moves on in the same direction and its latent is near the last one;
else it starts cold. Calls that share a timestep are streams (conditional, unconditional), told apart by their
conditioning; the first step fixes how many there are. What doesn't fit is computed in full and changes nothing.

What it can't see: a trajectory whose latents, conditioning and timesteps all look like the next step of another one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

MAX_STREAMS = 4

_NAME_IT = "tell the calls apart with moeca_compile.trajectory(model, steps, stream=...)"


@dataclass(frozen=True, slots=True)
class CallObservation:
    """What one call shows: its timestep (None: unreadable, and `trouble` says why), what its conditioning inputs
    hold, the latent's relative change since the last call of its kind in this trajectory, else since any call (0 where
    there was none, negative where they can't be compared), and its `kind`: calls of one signature are of one."""

    timestep: float | None
    condition: tuple[Hashable, ...] = ()
    jump: float = 0.0
    trouble: str = ""
    kind: Hashable = 0


@dataclass(frozen=True, slots=True)
class StepPlacement:
    """Where a call belongs. `stream` None: nowhere, compute in full and keep nothing. `restart`: forget all streams.
    `broken_off`: it restarts because the call doesn't look like the next one; the sampling loop may be the same."""

    step: int
    stream: Hashable | None
    restart: bool = False
    warning: str = ""
    broken_off: bool = False


@dataclass(slots=True)
class Clock:
    """One trajectory at a time. `latent_jump` is the largest change between calls of one trajectory; inf: any.

    Calls of another kind (another batch, a keyword more) may come at any step: the streams of a kind are fixed in the
    step in which its first call comes."""

    latent_jump: float = 0.7
    step: int = -1
    timestep: float = 0.0
    direction: int = 0
    streams: list[tuple[Hashable, Hashable]] = field(default_factory=list)  # kind and condition
    since: dict[Hashable, int] = field(default_factory=dict)  # the step of a kind's first call
    seen: set[int] = field(default_factory=set)
    broken_off: int = 0  # starts in a row that were cut short after one step

    def observe(self, call: CallObservation) -> StepPlacement:
        """Place one call, and move on."""
        if call.timestep is None:
            return StepPlacement(max(self.step, 0), None, warning=call.trouble)
        if self.step < 0:
            return self._start(call)
        forward = (call.timestep > self.timestep) - (call.timestep < self.timestep)
        if forward and self.direction and forward != self.direction:
            return self._start(call)
        if self._is_elsewhere(call):
            return self._start(call, self._interrupted(call), broken_off=bool(forward))
        if not forward:
            return self._same_timestep(call)
        self.direction, self.timestep = forward, call.timestep
        self.step += 1
        self.seen = set()
        self.broken_off = 0
        return self._place(call)

    def miss(self) -> None:
        """A call wasn't seen: with one stream it was a step; with several, the next timestep will tell."""
        self.step += self.step >= 0 and len(self.streams) == 1

    def _is_elsewhere(self, call: CallObservation) -> bool:
        if math.isinf(self.latent_jump) or (call.kind not in self.since and call.timestep == self.timestep):
            return False  # streams may have latents of their own
        return not 0 <= call.jump <= self.latent_jump  # NOTE: not `>`: a latent that isn't finite is near nothing

    def _interrupted(self, call: CallObservation) -> str:
        """The warning for a start that breaks a trajectory off. A lone call may have been anything, a warm-up for
        instance; but one after the other are trajectories that take turns, or steps that are too far apart."""
        self.broken_off += call.timestep != self.timestep and self.step == 0
        resized = call.jump < 0
        if self.broken_off < 2 and (self.step == 0 or resized):
            return ""
        what = "the latent's shape changed" if resized else f"the latent changed by {call.jump:.2f} of its norm"
        return (
            f"{what} between two calls: taken for another trajectory, so this step is computed in full; with "
            f"interleaved trajectories {_NAME_IT}"
        )

    def _start(self, call: CallObservation, warning: str = "", broken_off: bool = False) -> StepPlacement:
        assert call.timestep is not None
        self.step, self.timestep, self.direction = 0, call.timestep, 0
        self.streams, self.since, self.seen = [(call.kind, call.condition)], {call.kind: 0}, {0}
        return StepPlacement(0, 0, True, warning, broken_off)

    def _same_timestep(self, call: CallObservation) -> StepPlacement:
        if self.step == 0 and (call.kind, call.condition) in self.streams:
            return self._start(call)  # the first step again: another image, or a repeated first call
        return self._place(call)

    def _place(self, call: CallObservation) -> StepPlacement:
        one = call.kind, call.condition
        if one not in self.streams and self.since.setdefault(call.kind, self.step) == self.step:
            if sum(kind == call.kind for kind, _ in self.streams) == MAX_STREAMS:
                return StepPlacement(
                    self.step, None, warning=f"more than {MAX_STREAMS} calls share a timestep; {_NAME_IT}"
                )
            self.streams.append(one)
        for number, stream in enumerate(self.streams):
            if number not in self.seen and stream == one:
                self.seen.add(number)
                return StepPlacement(self.step, number)
        again = one in self.streams
        what = "a timestep was visited again" if again else "the conditioning isn't that of the first step"
        return StepPlacement(self.step, None, warning=f"{what}: computed in full, nothing kept; {_NAME_IT}")


@dataclass(slots=True)
class Counter:
    """The exact clock of a named stream: every call is the next step."""

    step: int = -1

    def observe(self, call: CallObservation) -> StepPlacement:
        self.step += 1
        return StepPlacement(self.step, "named", restart=self.step == 0)

    def miss(self) -> None:
        """A call wasn't seen."""
        self.step += 1
