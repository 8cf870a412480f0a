"""The clocks of a trajectory: they decide which step and which guidance stream a call is. No torch here.

A call continues the trajectory if its timestep moves on in the same direction and its latent is near the last one;
otherwise the call starts a new trajectory. Calls that share a timestep are guidance streams (conditional,
unconditional). Their conditioning identifies them, and the first step fixes their number. A call that fits no stream
is computed in full and changes no state.

Limitation: a trajectory whose latents, conditioning and timesteps all look like the next step of another trajectory
isn't recognized as a new one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

MAX_STREAMS = 4

_USE_STREAM = "tell the calls apart with moeca_compile.trajectory(model, steps, stream=...)"


@dataclass(frozen=True, slots=True)
class CallObservation:
    """What the clock is told about one call.

    Attributes:
        timestep: as the model received it; of several the middle one. None: it can't be read.
        condition: for each conditioning input, a number that identifies its contents.
        jump: relative change of the latent since the last call of this kind in the trajectory, or else since any call.
            0: there was no earlier call. Negative: the latents can't be compared.
        trouble: why the call can't be the next step.
        kind: identifies the input signature; calls of one signature have the same kind.
        eps: relative spacing of the timestep's dtype, if two steps may have the same timestep in it; else 0.
        position: of several timesteps, a number that moves with each of them. None: `timestep` is the only one.
        key: of several timesteps, what identifies them. None: `timestep` does.
        by_sample: samples of the batch have different timesteps.
    """

    timestep: float | None
    condition: tuple[Hashable, ...] = ()
    jump: float = 0.0
    trouble: str = ""
    kind: Hashable = 0
    eps: float = 0.0
    position: float | None = None
    key: Hashable = None
    by_sample: bool = False


@dataclass(frozen=True, slots=True)
class StepPlacement:
    """Which step and stream a call is.

    Attributes:
        step: its number in the trajectory, from 0.
        stream: None: the call fits no stream; compute it in full and keep nothing.
        restart: the call begins a trajectory; drop the state of all streams.
        warning: a text for the user; "" for none.
        broken_off: `restart` is set because the call doesn't look like the next one. The sampling loop may still be
            the same.
    """

    step: int
    stream: Hashable | None
    restart: bool = False
    warning: str = ""
    broken_off: bool = False


@dataclass(slots=True)
class Clock:
    """The clock for calls whose stream has no name; it follows one trajectory at a time.

    Calls of another kind (another batch, one more keyword) may come at any step. The streams of a kind are fixed in the
    step of its first call.

    Attributes:
        latent_jump: the largest relative change of the latent between two calls of one trajectory; inf: any.
        step: the current step; -1 before the first call.
        timestep: of the current step.
        moved: change of the timestep in the last step.
        direction: 1 where timesteps increase, -1 where they decrease, 0 before the second step.
        positions: by kind, where several timesteps of a call of the current step are.
        streams: kind and condition of each stream.
        since: by kind, the step of its first call.
        placed: numbers of the streams whose call of the current step has come.
        broken_off: consecutive trajectories that were broken off after one step.
    """

    latent_jump: float = 0.7
    step: int = -1
    timestep: float = 0.0
    moved: float = 0.0
    direction: int = 0
    positions: dict[Hashable, float] = field(default_factory=dict)
    streams: list[tuple[Hashable, Hashable]] = field(default_factory=list)
    since: dict[Hashable, int] = field(default_factory=dict)
    placed: set[int] = field(default_factory=set)
    broken_off: int = 0

    def observe(self, call: CallObservation) -> StepPlacement:
        """Place one call, and advance the clock."""
        if call.timestep is None:
            return StepPlacement(max(self.step, 0), None, warning=call.trouble)
        if self.step < 0:
            return self._start(call)
        forward = (call.timestep > self.timestep) - (call.timestep < self.timestep)
        if not forward and call.position is not None:  # the middle timestep may be one that stays as it is
            before = self.positions.setdefault(call.kind, call.position)
            forward = (call.position > before) - (call.position < before)
        if forward and self.direction and forward != self.direction:
            return self._start(call)
        if self._is_elsewhere(call):
            return self._start(call, self._interrupted(call), broken_off=bool(forward))
        if call.trouble:
            return StepPlacement(self.step, None, warning=call.trouble)
        if not (forward or self._is_rounded_step(call)):
            return self._same_timestep(call)
        self.direction = forward or self.direction
        self.moved, self.timestep = call.timestep - self.timestep, call.timestep
        self.step += 1
        self.placed = set()
        self.broken_off = 0
        self.positions = {} if call.position is None else {call.kind: call.position}
        return self._place(call)

    def miss(self) -> None:
        """Count a call that didn't reach the clock. With one stream the call was a step. With several streams the next
        call's timestep shows whether a step passed."""
        self.step += self.step >= 0 and len(self.streams) == 1

    def _is_rounded_step(self, call: CallObservation) -> bool:
        """Whether the call is the next step although its timestep is the last one's: its stream has had its call of
        this step, the latent moved on, and the steps are as small as the spacing of the timestep's dtype."""
        if not call.eps or not call.jump > 0:
            return False
        assert call.timestep is not None
        spacing = math.ldexp(call.eps, math.frexp(call.timestep)[1] - 1)
        identity = call.kind, call.condition
        numbers = {number for number, stream in enumerate(self.streams) if stream == identity}
        return bool(numbers) and numbers <= self.placed and abs(self.moved) <= 2 * spacing

    def _is_elsewhere(self, call: CallObservation) -> bool:
        if math.isinf(self.latent_jump) or (call.kind not in self.since and call.timestep == self.timestep):
            return False  # each stream may have its own latent
        return not 0 <= call.jump <= self.latent_jump  # NOTE: not `>`: a jump that is NaN must start a new trajectory

    def _interrupted(self, call: CallObservation) -> str:
        """The warning for a start that breaks a trajectory off. A single call may be a warm-up, for instance. Several
        in a row are interleaved trajectories, or steps that are too far apart."""
        self.broken_off += call.timestep != self.timestep and self.step == 0
        resized = call.jump < 0
        if self.broken_off < 2 and (self.step == 0 or resized):
            return ""
        what = "the latent's shape changed" if resized else f"the latent changed by {call.jump:.2f} of its norm"
        return (
            f"{what} between two calls: taken for another trajectory, so this step is computed in full; with "
            f"interleaved trajectories {_USE_STREAM}"
        )

    def _start(self, call: CallObservation, warning: str = "", broken_off: bool = False) -> StepPlacement:
        assert call.timestep is not None
        self.step, self.timestep, self.moved, self.direction = 0, call.timestep, 0.0, 0
        self.positions = {} if call.position is None else {call.kind: call.position}
        self.streams, self.since, self.placed = [(call.kind, call.condition)], {call.kind: 0}, {0}
        return StepPlacement(0, 0, True, warning, broken_off)

    def _same_timestep(self, call: CallObservation) -> StepPlacement:
        if self.step == 0 and (call.kind, call.condition) in self.streams:
            return self._start(call)  # the first step once more: a new trajectory, or a repeated first call
        return self._place(call)

    def _place(self, call: CallObservation) -> StepPlacement:
        identity = call.kind, call.condition
        if identity not in self.streams and self.since.setdefault(call.kind, self.step) == self.step:
            if sum(kind == call.kind for kind, _ in self.streams) == MAX_STREAMS:
                return StepPlacement(
                    self.step, None, warning=f"more than {MAX_STREAMS} calls share a timestep; {_USE_STREAM}"
                )
            self.streams.append(identity)
        for number, stream in enumerate(self.streams):
            if number not in self.placed and stream == identity:
                self.placed.add(number)
                return StepPlacement(self.step, number)
        is_repeated = identity in self.streams
        what = "a timestep was visited again" if is_repeated else "the conditioning isn't that of the first step"
        return StepPlacement(self.step, None, warning=f"{what}: computed in full, nothing kept; {_USE_STREAM}")


@dataclass(slots=True)
class Counter:
    """The clock of a named stream: every call is the next step."""

    step: int = -1

    def observe(self, call: CallObservation) -> StepPlacement:
        self.step += 1
        return StepPlacement(self.step, "named", restart=self.step == 0)

    def miss(self) -> None:
        """Count a call that didn't reach the clock."""
        self.step += 1
