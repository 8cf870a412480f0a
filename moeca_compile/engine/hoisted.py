"""Hoisted values while images are made: what doesn't change with the latent, kept for one stream of a trajectory.

Nothing outlives its trajectory: everything is computed from the weights again when the next one starts. Within one it
is kept with what it came from, and computed again where that changed: inputs are looked at in every call, weights in
those that compute everything anew, where a look costs little beside them. Where the timesteps are known ahead
(from the schedule, or because the last trajectory had them), the values of many steps are computed at once: one
matrix multiplication reads each weight once, and not once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from moeca_compile.errors import LoweringError
from moeca_compile.graph.content import Stamp
from moeca_compile.graph.nowait import needs_device_sync, upload
from moeca_compile.graph.regions import HoistedValue
from moeca_compile.graph.variant import Variant

TABLE_BYTES = 256 * 2**20  # of values for steps to come
MAX_CHANGES = 2  # an input that changed more often in a trajectory makes what came from it serve one call only

Run = Callable[[Sequence[Any]], Sequence[Any]]
Content = Callable[[int], Hashable]  # what tells the content of an argument, by its position
Values = dict[int, torch.Tensor]  # by position in the program's list


class HasPrologues(Protocol):
    """What is needed of a program; `over_steps` None: its values can't be computed for many timesteps at once."""

    hoisted: tuple[HoistedValue, ...]
    timestep: int | None
    condition: tuple[int, ...]

    def prologue(self, gives: tuple[int, ...], args: Sequence[Any]) -> tuple[Variant, Run]: ...
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


class Hoisted:
    """The values of one stream, for as long as its trajectory lasts."""

    def __init__(self, ahead: Ahead | None = None) -> None:
        self.ahead = ahead or Ahead()
        self.inputs: dict[int, Hashable] = {}  # numbers of their contents, by position among the call's arguments
        self.weights: dict[int, Stamp] = {}
        self.changes = 0
        self._levels: dict[tuple[int, ...], tuple[tuple[int, ...], list[int]]] = {}  # those of a step, and the others
        self._forget()

    def _forget(self) -> None:
        self.inputs.clear()
        self.weights.clear()
        self.fixed: Values = {}
        self.last: tuple[float, Values] = (0.0, {})
        self.table: Values = {}  # [steps, ...]
        self.rows: dict[float, int] = {}  # by timestep

    @property
    def bytes(self) -> int:
        """Of all values that are kept."""
        kept = [*self.fixed.values(), *self.last[1].values(), *self.table.values()]
        return sum(one.numel() * one.element_size() for one in kept)

    def weights_changed(self, args: Sequence[Any]) -> bool:
        """Whether weights that came into the values aren't what they were; then nothing is kept any more."""
        self.last = (0.0, {})  # no stamp of its weights was taken, for it serves one step
        if all(stamp.matches(args[i]) for i, stamp in self.weights.items()):
            return False
        self._forget()
        return True

    def of(
        self, program: HasPrologues, wanted: tuple[int, ...], args: Sequence[Any], timestep: float | None,
        content: Content | None = None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """The values at positions `wanted` for a call with `args`; `timestep` None: not known on the host. Without
        `content` they serve this call only."""
        if not wanted:
            return []
        if content is not None and not all(content(i) == known for i, known in self.inputs.items()):
            self.changes += 1
            self._forget()
        elif self._restless:
            self._forget()
        if wanted not in self._levels:
            steps = tuple(p for p in wanted if program.hoisted[p].level == "step")
            self._levels[wanted] = steps, [p for p in wanted if p not in steps]
        steps, lasting = self._levels[wanted]
        found = self._invariant(program, lasting, args, content)
        if steps:
            found = found | self._at(program, steps, args, timestep, content)
        return [found[position] for position in wanted]

    @property
    def _restless(self) -> bool:
        """Whether the inputs change so often that what came from them serves one call only."""
        return self.changes > MAX_CHANGES

    def _invariant(
        self, program: HasPrologues, wanted: Sequence[int], args: Sequence[Any], content: Content | None
    ) -> Values:
        missing = tuple(p for p in wanted if p not in self.fixed)
        if not missing:
            return self.fixed
        variant, run = program.prologue(missing, args)
        self.fixed |= zip(missing, run(self._inputs(program, variant, args, content)), strict=True)
        return self.fixed

    def _at(
        self, program: HasPrologues, wanted: tuple[int, ...], args: Sequence[Any], timestep: float | None,
        content: Content | None,
    ) -> Values:  # fmt: skip
        if timestep is not None:
            if self.last[0] == timestep and self.last[1].keys() >= set(wanted):
                return self.last[1]
            if timestep in self.rows or self._fill(program, args, timestep, content):
                row = self.rows[timestep]
                return {position: self.table[position][row] for position in wanted}
        variant, run = program.prologue(wanted, args)
        found = dict(zip(wanted, run(self._inputs(program, variant, args, content, lasting=False)), strict=True))
        if timestep is not None:
            self.last = timestep, found
        return found

    def _fill(self, program: HasPrologues, args: Sequence[Any], timestep: float, content: Content | None) -> bool:
        """Compute the values of this step and those to come; False where that can't be done."""
        every = [(p, one.bytes) for p, one in enumerate(program.hoisted) if one.level == "step"]
        count = TABLE_BYTES // max(1, sum(size for _, size in every))
        coming = tuple(dict.fromkeys(self.ahead.after(timestep)))[:count]
        made = program.over_steps(tuple(p for p, _ in every)) if len(coming) > 1 else None
        if made is None or program.timestep is None or self._restless:
            return False
        variant, run = made
        given = self._inputs(program, variant, args, content)
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

    def _inputs(
        self,
        program: HasPrologues,
        variant: Variant,
        args: Sequence[Any],
        content: Content | None,
        lasting: bool = True,
    ) -> list[Any]:
        """What a prologue takes; it is remembered what inputs and (if what it gives is `lasting`) weights hold."""
        fixed = self._invariant(program, variant.hoists, args, content)
        if content is not None and not self._restless:
            for i in variant.takes:
                if i in program.condition:
                    self.inputs.setdefault(i, content(i))
                elif lasting and i != program.timestep and i not in self.weights and not needs_device_sync(args[i]):
                    self.weights[i] = Stamp(args[i])
        return [*(args[i] for i in variant.takes), *(fixed[position] for position in variant.hoists)]


def uniform_timestep(value: Any) -> float | None:
    """The one timestep of a call, where it can be read without waiting for an accelerator."""
    if not isinstance(value, torch.Tensor) or needs_device_sync(value) or not value.numel():
        return None
    low, high = value.detach().double().aminmax()
    return float(low) if low == high else None
