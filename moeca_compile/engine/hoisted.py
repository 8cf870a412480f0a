"""Hoisted values while images are made: what doesn't change with the latent, kept for one stream of a trajectory.

Nothing outlives its trajectory: everything is computed from the weights again when the next one starts. Within one it
is kept with what it came from, and computed again where that changed: inputs are looked at in every call, weights in
those that compute everything anew, where a look costs little beside them. Where the timesteps are known ahead
(from the schedule, or because the last trajectory had them), the values of many steps are computed at once: one
matrix multiplication reads each weight once, and not once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import ne
from typing import Any, Protocol

import torch

from moeca_compile.errors import LoweringError
from moeca_compile.graph.content import Stamp, needs_device_sync
from moeca_compile.graph.nowait import upload
from moeca_compile.graph.regions import HoistedValue
from moeca_compile.graph.variant import Variant

TABLE_BYTES = 256 * 2**20  # of values for steps to come
MAX_CHANGES = 2  # an input that changed more often in a trajectory makes what came from it serve one call only

Run = Callable[[Sequence[Any]], Sequence[Any]]
Contents = Mapping[int, Hashable]  # numbers of what inputs hold, by position among the call's arguments
Values = dict[int, torch.Tensor]  # by position in the program's list


class HasPrologues(Protocol):
    """What is needed of a graph's prologues (`engine/prologues.py`)."""

    hoisted: tuple[HoistedValue, ...]
    of_step: tuple[int, ...]
    step_bytes: int
    timestep: int | None
    condition: tuple[int, ...]
    ready: dict[tuple[int, ...], tuple[Variant, Run]]
    by_step: bool

    def prologue(self, gives: tuple[int, ...], args: Sequence[Any]) -> tuple[Variant, Run]: ...
    def over_steps(self, gives: tuple[int, ...]) -> tuple[Variant, Run] | None: ...
    def give_up_steps(self, error: LoweringError) -> None: ...


@dataclass
class Past:
    """What is known of earlier trajectories of a handle: `walked` are the timesteps of the last whole one."""

    walked: Sequence[float] = ()


@dataclass
class Ahead:
    """Which timesteps a trajectory will have (`known`, as far as one can know) and had (`walked`). `past`: of the
    handle's earlier trajectories."""

    known: tuple[float, ...] = ()
    past: Past = field(default_factory=Past)
    walked: list[float] = field(default_factory=list)

    def after(self, timestep: float) -> tuple[float, ...]:
        """The known ones from `timestep` on."""
        return self.known[self.known.index(timestep) :] if timestep in self.known else ()

    def walk(self, timestep: float) -> None:
        """Note where the trajectory is; a longer one than the last, or one that goes elsewhere, is what the next one
        will be."""
        if not self.walked or self.walked[-1] != timestep:
            self.walked.append(timestep)
        new = self.known and timestep not in self.known
        if new or len(self.walked) >= len(self.past.walked):
            self.past.walked = self.walked


class Hoisted:
    """The values of one stream, for as long as its trajectory lasts.

    Args:
        ahead: the trajectory's timesteps, as far as they are known.
        number: a number for what a tensor holds; needed where values are kept for a second call.
    """

    def __init__(self, ahead: Ahead | None = None, number: Callable[[Any], Hashable] | None = None) -> None:
        self.ahead, self._number = ahead or Ahead(), number
        self.inputs: dict[int, Hashable] = {}  # numbers of their contents, by position among the call's arguments
        self.weights: dict[int, Stamp] = {}
        self.changes = 0
        # of the values that a variant takes: those of a step, and the others
        self._levels: dict[tuple[int, ...], tuple[tuple[int, ...], frozenset[int]]] = {}
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
        self, prologues: HasPrologues, wanted: tuple[int, ...], args: Sequence[Any], timestep: float | None,
        contents: Contents | None = None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """The values at positions `wanted` for a call with `args`.

        Args:
            timestep: None: not known on the host.
            contents: what tells the contents of the inputs that values came from before. None: the values serve this
                call only.
        """
        if not wanted:
            return []
        if contents is not None and any(map(ne, map(contents.get, self.inputs), self.inputs.values())):
            self.changes += 1
            self._forget()
        elif self.changes > MAX_CHANGES:
            self._forget()
        if wanted not in self._levels:
            steps = tuple(p for p in wanted if prologues.hoisted[p].level == "step")
            self._levels[wanted] = steps, frozenset(wanted) - frozenset(steps)
        steps, lasting = self._levels[wanted]
        if not lasting <= self.fixed.keys():
            self._compute_invariant(prologues, lasting, args, contents)
        values = self.fixed
        if steps:
            values = values | self._at(prologues, steps, args, timestep, contents)
        return list(map(values.__getitem__, wanted))

    def _compute_invariant(
        self, prologues: HasPrologues, wanted: Iterable[int], args: Sequence[Any], contents: Contents | None
    ) -> None:
        missing = tuple(sorted(p for p in wanted if p not in self.fixed))
        variant, run = prologues.ready.get(missing) or prologues.prologue(missing, args)
        values = run(self._inputs(prologues, variant, args, contents))
        self.fixed = self.fixed | dict(zip(missing, values, strict=True))

    def _at(
        self, prologues: HasPrologues, wanted: tuple[int, ...], args: Sequence[Any], timestep: float | None,
        contents: Contents | None,
    ) -> Values:  # fmt: skip
        if timestep is not None:
            if self.last[0] == timestep and self.last[1].keys() >= set(wanted):
                return self.last[1]
            if timestep not in self.rows and not (prologues.by_step or self.changes > MAX_CHANGES):
                self._fill(prologues, args, timestep, contents)
            if timestep in self.rows:
                row = self.rows[timestep]
                return {position: self.table[position][row] for position in wanted}
        variant, run = prologues.ready.get(wanted) or prologues.prologue(wanted, args)
        values = run(self._inputs(prologues, variant, args, contents, lasting=False))
        by_position = dict(zip(wanted, values, strict=True))
        if timestep is not None:
            self.last = timestep, by_position
        return by_position

    def _fill(self, prologues: HasPrologues, args: Sequence[Any], timestep: float, contents: Contents | None) -> None:
        """Compute the values of this step and those to come, where that can be done."""
        count = TABLE_BYTES // max(1, prologues.step_bytes)
        coming = tuple(dict.fromkeys(self.ahead.after(timestep)))[:count]
        mapped = prologues.over_steps(prologues.of_step) if len(coming) > 1 else None
        if mapped is None or prologues.timestep is None:
            return
        variant, run = mapped
        inputs = self._inputs(prologues, variant, args, contents)
        own = args[prologues.timestep]
        times = upload(torch.tensor(coming, dtype=torch.float64).to(own.dtype), own.device)
        inputs[variant.takes.index(prologues.timestep)] = times.reshape(-1, *[1] * own.dim()).expand(-1, *own.shape)
        try:
            values = run(inputs)
        except LoweringError as error:
            prologues.give_up_steps(error)
            return
        self.table = dict(zip(prologues.of_step, values, strict=True))
        self.rows = {time: row for row, time in enumerate(coming)}

    def _inputs(
        self, prologues: HasPrologues, variant: Variant, args: Sequence[Any], contents: Contents | None,
        lasting: bool = True,
    ) -> list[Any]:  # fmt: skip
        """What a prologue takes; it is remembered what inputs and (if what it gives is `lasting`) weights hold."""
        if not self.fixed.keys() >= set(variant.hoists):
            self._compute_invariant(prologues, variant.hoists, args, contents)
        if contents is not None and self.changes <= MAX_CHANGES:
            assert self._number is not None
            for i in variant.takes:
                if i in prologues.condition:
                    if i not in self.inputs:
                        self.inputs[i] = contents[i] if i in contents else self._number(args[i])
                elif lasting and i != prologues.timestep and i not in self.weights and not needs_device_sync(args[i]):
                    self.weights[i] = Stamp(args[i])
        return [*map(args.__getitem__, variant.takes), *map(self.fixed.__getitem__, variant.hoists)]


def uniform_timestep(value: Any) -> float | None:
    """The one timestep of a call, where it can be read without waiting for an accelerator."""
    if not isinstance(value, torch.Tensor) or needs_device_sync(value) or not value.numel():
        return None
    low, high = value.detach().double().aminmax()
    return float(low) if low == high else None
