"""Which step and which stream is this call? Decided outside the graph, from what a call shows. No torch here.

A call goes on with the trajectory if its timestep moves on in the same direction and its latent is near the last one;
else it starts cold. Calls that share a timestep are streams (conditional, unconditional), told apart by their
conditioning; the first step fixes how many there are. What doesn't fit is computed in full and changes nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

MAX_STREAMS = 4

_NAME_IT = "tell the calls apart with moeca_compile.trajectory(model, steps, stream=...)"


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one call shows: its timestep (None: unreadable, and `trouble` says why), a fingerprint of its
    conditioning inputs, and the latent's relative change since the last call (0 where there was none)."""

    timestep: float | None
    condition: Hashable = ()
    jump: float = 0.0
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Tick:
    """Where a call belongs. `stream` None: nowhere, compute in full and keep nothing. `restart`: forget all streams."""

    step: int
    stream: Hashable | None
    restart: bool = False
    warning: str = ""


@dataclass(slots=True)
class Clock:
    """One trajectory at a time. `latent_jump` is the largest change between calls of one trajectory."""

    latent_jump: float = 0.7
    step: int = -1
    timestep: float = 0.0
    direction: int = 0
    streams: list[Hashable] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def observe(self, call: Sighting) -> Tick:
        """Place one call, and move on."""
        if call.timestep is None:
            return Tick(max(self.step, 0), None, warning=call.trouble)
        if self.step < 0:
            return self._start(call)
        if call.timestep == self.timestep:
            return self._same_timestep(call)
        forward = 1 if call.timestep > self.timestep else -1
        if self.direction and forward != self.direction:
            return self._start(call)
        if call.jump > self.latent_jump:
            known = self.step > 0  # a single call before may have been anything, a warm-up for instance
            return self._start(
                call,
                f"the latent changed by {call.jump:.2f} of its norm between two calls: taken for another trajectory, "
                f"so this step is computed in full; with interleaved trajectories {_NAME_IT}"
                if known
                else "",
            )
        self.direction, self.timestep = forward, call.timestep
        self.step += 1
        self.seen = set()
        return self._place(call)

    def _start(self, call: Sighting, warning: str = "") -> Tick:
        assert call.timestep is not None
        self.step, self.timestep, self.direction = 0, call.timestep, 0
        self.streams, self.seen = [call.condition], {0}
        return Tick(0, 0, restart=True, warning=warning)

    def _same_timestep(self, call: Sighting) -> Tick:
        if self.step > 0:
            return self._place(call)
        if call.condition in self.streams or call.jump > self.latent_jump:
            return self._start(call)  # the first step again: another image, or a repeated first call
        if len(self.streams) == MAX_STREAMS:
            return Tick(0, None, warning=f"more than {MAX_STREAMS} calls share a timestep; {_NAME_IT}")
        self.streams.append(call.condition)
        self.seen.add(len(self.streams) - 1)
        return Tick(0, len(self.streams) - 1)

    def _place(self, call: Sighting) -> Tick:
        for number, condition in enumerate(self.streams):
            if number not in self.seen and condition == call.condition:
                self.seen.add(number)
                return Tick(self.step, number)
        again = call.condition in self.streams
        what = "a timestep was visited again" if again else "the conditioning isn't that of the first step"
        return Tick(self.step, None, warning=f"{what}: computed in full, nothing kept; {_NAME_IT}")


@dataclass(slots=True)
class Counter:
    """The exact clock of a named stream: every call is the next step."""

    step: int = -1

    def observe(self, call: Sighting) -> Tick:
        self.step += 1
        return Tick(self.step, "named", restart=self.step == 0)
