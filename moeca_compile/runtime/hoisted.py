"""Hoisted values while images are made: what doesn't change with the latent, kept for one stream of a trajectory.

Nothing outlives its trajectory: everything is computed from the weights again when the next one starts. Within one it
is kept with the inputs that it came from, and computed again where these changed. Where the timesteps are known ahead
(from the schedule, or because the last trajectory had them), the values of many steps are computed at once: one
matrix multiplication reads each weight once, and not once a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from moeca_compile.errors import LoweringError
from moeca_compile.regions import HoistedValue
from moeca_compile.runtime.nowait import must_be_waited_for, upload
from moeca_compile.variant import Variant

TABLE_BYTES = 256 * 2**20  # of values for steps to come
SMALL = 2**16  # elements; to compare fewer costs less than they are worth
MAX_CHANGES = 2  # an input that changed more often in a trajectory isn't worth a copy

Run = Callable[[Sequence[Any]], Sequence[Any]]
Values = dict[int, torch.Tensor]  # by position in the program's list


class Preluded(Protocol):
    """What is needed of a program; `over_steps` None: its values can't be computed for many timesteps at once."""

    hoisted: tuple[HoistedValue, ...]
    timestep: int | None
    condition: tuple[int, ...]

    def prelude(self, gives: tuple[int, ...], args: Sequence[Any]) -> tuple[Variant, Run]: ...
    def over_steps(self, gives: tuple[int, ...]) -> tuple[Variant, Run] | None: ...
    def give_up_steps(self, error: LoweringError) -> None: ...


@dataclass
class Ahead:
    """Which timesteps a trajectory will have (`known`, as far as one can know) and had (`walked`)."""

    known: tuple[float, ...] = ()
    walked: list[float] = field(default_factory=list)

    def after(self, timestep: float) -> tuple[float, ...]:
        """The known ones from `timestep` on."""
        return self.known[self.known.index(timestep) :] if timestep in self.known else ()

    def walk(self, timestep: float) -> None:
        if not self.walked or self.walked[-1] != timestep:
            self.walked.append(timestep)


class _Kept:
    """An input as it was. One that is large, or on an accelerator that would have to be waited for, is taken to be the
    same while it is the same object in the same version."""

    def __init__(self, value: torch.Tensor) -> None:
        self.ref, self.version, self.copy = weakref.ref(value), _version(value), value.detach().clone()

    def matches(self, value: torch.Tensor) -> bool:
        dear = value.numel() > SMALL or must_be_waited_for(value)
        if dear and self.ref() is value and _version(value) == self.version >= 0:
            return True
        return torch.equal(self.copy, value)


class Hoisted:
    """The values of one stream, for as long as its trajectory lasts."""

    def __init__(self, ahead: Ahead | None = None) -> None:
        self.ahead = ahead or Ahead()
        self.inputs: dict[int, _Kept] = {}  # by position among the call's arguments
        self.changes = 0
        self._levels: dict[tuple[int, ...], tuple[tuple[int, ...], list[int]]] = {}  # those of a step, and the others
        self._forget()

    def _forget(self) -> None:
        self.inputs.clear()
        self.fixed: Values = {}
        self.last: tuple[float, Values] = (0.0, {})
        self.table: Values = {}  # [steps, ...]
        self.rows: dict[float, int] = {}  # by timestep

    @property
    def bytes(self) -> int:
        """Of all values that are kept."""
        kept = [*self.fixed.values(), *self.last[1].values(), *self.table.values()]
        return sum(one.numel() * one.element_size() for one in kept)

    def of(
        self, program: Preluded, wanted: tuple[int, ...], args: Sequence[Any], timestep: float | None
    ) -> list[torch.Tensor]:
        """The values at positions `wanted` for a call with `args`; `timestep` None: not known on the host."""
        if not wanted:
            return []
        if not all(kept.matches(args[i]) for i, kept in self.inputs.items()):
            self.changes += 1
            self._forget()
        elif self._restless:
            self._forget()
        if wanted not in self._levels:
            steps = tuple(p for p in wanted if program.hoisted[p].level == "step")
            self._levels[wanted] = steps, [p for p in wanted if p not in steps]
        steps, lasting = self._levels[wanted]
        found = self._invariant(program, lasting, args)
        if steps:
            found = found | self._at(program, steps, args, timestep)
        return [found[position] for position in wanted]

    @property
    def _restless(self) -> bool:
        """Whether the inputs change so often that what came from them serves one call only."""
        return self.changes > MAX_CHANGES

    def _invariant(self, program: Preluded, wanted: Sequence[int], args: Sequence[Any]) -> Values:
        missing = tuple(p for p in wanted if p not in self.fixed)
        if not missing:
            return self.fixed
        variant, run = program.prelude(missing, args)
        self.fixed |= zip(missing, run(self._inputs(program, variant, args)), strict=True)
        return self.fixed

    def _at(self, program: Preluded, wanted: tuple[int, ...], args: Sequence[Any], timestep: float | None) -> Values:
        if timestep is not None:
            if self.last[0] == timestep and self.last[1].keys() >= set(wanted):
                return self.last[1]
            if timestep in self.rows or self._fill(program, args, timestep):
                row = self.rows[timestep]
                return {position: self.table[position][row] for position in wanted}
        variant, run = program.prelude(wanted, args)
        found = dict(zip(wanted, run(self._inputs(program, variant, args)), strict=True))
        if timestep is not None:
            self.last = timestep, found
        return found

    def _fill(self, program: Preluded, args: Sequence[Any], timestep: float) -> bool:
        """Compute the values of this step and those to come; False where that can't be done."""
        every = [(p, one.bytes) for p, one in enumerate(program.hoisted) if one.level == "step"]
        count = TABLE_BYTES // max(1, sum(size for _, size in every))
        coming = tuple(dict.fromkeys(self.ahead.after(timestep)))[:count]
        made = program.over_steps(tuple(p for p, _ in every)) if len(coming) > 1 else None
        if made is None or program.timestep is None or self._restless:
            return False
        variant, run = made
        given = self._inputs(program, variant, args)
        own = args[program.timestep]
        times = upload(torch.tensor(coming, dtype=torch.float64).to(own.dtype), own.device)
        given[variant.takes.index(program.timestep)] = times.reshape(-1, *[1] * own.dim()).expand(-1, *own.shape)
        try:
            values = run(given)
        except LoweringError as error:
            program.give_up_steps(error)
            return False
        self.table = dict(zip((p for p, _ in every), values, strict=True))
        self.rows = {time: row for row, time in enumerate(coming)}
        return True

    def _inputs(self, program: Preluded, variant: Variant, args: Sequence[Any]) -> list[Any]:
        """What a prelude takes; the inputs among them are remembered with their values."""
        fixed = self._invariant(program, variant.hoists, args)
        if not self._restless:
            for i in variant.takes:
                if i in program.condition and i not in self.inputs:
                    self.inputs[i] = _Kept(args[i])
        return [*(args[i] for i in variant.takes), *(fixed[position] for position in variant.hoists)]


def uniform_timestep(value: Any) -> float | None:
    """The one timestep of a call, where it can be read without waiting for an accelerator."""
    if not isinstance(value, torch.Tensor) or must_be_waited_for(value) or not value.numel():
        return None
    low, high = value.detach().double().aminmax()
    return float(low) if low == high else None


def _version(value: torch.Tensor) -> int:
    return -1 if value.is_inference() else value._version
