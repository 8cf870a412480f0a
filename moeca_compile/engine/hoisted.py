"""Hoisted values of one stream of a trajectory: values that don't depend on the latent.

No value outlives its trajectory. Within a trajectory a value is stored with the contents that it was computed from, and
computed again when they change. Inputs are compared in every call. Weights are compared in calls that compute
everything, where the comparison is cheap beside the rest. Where the timesteps are known in advance (from the schedule
or the last trajectory), the values of many steps are computed at once, so that each weight is read once and not once a
step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import ne
from typing import Any, Protocol

import torch

from moeca_compile.engine.freeing.plan import PlannedValues, WeightFreeing
from moeca_compile.engine.freeing.weights import FreedWeights
from moeca_compile.engine.trajectories.timesteps import StepKey, VariedTimesteps
from moeca_compile.errors import LoweringError
from moeca_compile.graph.content import Stamp, needs_device_sync
from moeca_compile.graph.nowait import upload
from moeca_compile.graph.regions import HoistedValue
from moeca_compile.graph.variant import Variant

TABLE_BYTES = 256 * 2**20  # limit for the values of later steps
MAX_CHANGES = 2  # if the inputs change more often in a trajectory, values serve one call only

Run = Callable[[Sequence[Any]], Sequence[Any]]
Contents = Mapping[
    int, Hashable
]  # by position among the call's arguments, a number that identifies an input's contents
Values = dict[int, torch.Tensor]  # by position in the graph's list of hoisted values


class HasPrologues(Protocol):
    """The part of `engine/prologues.py` that is used here."""

    hoisted: tuple[HoistedValue, ...]
    of_step: tuple[int, ...]
    step_bytes: int
    timesteps: tuple[int, ...]
    condition: tuple[int, ...]
    ready: dict[tuple[int, ...], tuple[Variant, Run]]
    by_step: bool

    @property
    def freed(self) -> FreedWeights | None: ...

    def prologue(self, gives: tuple[int, ...], args: Sequence[Any]) -> tuple[Variant, Run]: ...
    def over_steps(self, gives: tuple[int, ...]) -> tuple[Variant, Run] | None: ...
    def give_up_steps(self, error: LoweringError) -> None: ...


@dataclass
class TimestepHistory:
    """Timesteps of a handle's earlier trajectories. `last`: of the last complete one."""

    last: Sequence[StepKey] = ()


@dataclass
class TimestepPlan:
    """The timesteps of a trajectory. Those of a call that has several are one entry.

    Attributes:
        expected: timesteps that it is expected to have; empty: not known.
        history: of the handle's earlier trajectories.
        visited: timesteps that it has had.
    """

    expected: tuple[StepKey, ...] = ()
    history: TimestepHistory = field(default_factory=TimestepHistory)
    visited: list[StepKey] = field(default_factory=list)

    def after(self, timestep: StepKey) -> tuple[StepKey, ...]:
        """The expected timesteps from `timestep` on."""
        return self.expected[self.expected.index(timestep) :] if timestep in self.expected else ()

    def visit(self, timestep: StepKey) -> None:
        """Record a timestep. If the trajectory gets as long as the last one, or leaves the expected timesteps, the next
        trajectory is expected to be like this one. Contents of inputs with several timesteps can't be expected."""
        if isinstance(timestep, VariedTimesteps):
            return
        if not self.visited or self.visited[-1] != timestep:
            self.visited.append(timestep)
        is_unexpected = self.expected and timestep not in self.expected
        if is_unexpected or len(self.visited) >= len(self.history.last):
            self.history.last = self.visited


class Hoisted:
    """The hoisted values of one stream in one trajectory.

    Args:
        plan: the trajectory's timesteps.
        number: identifies the contents of a tensor; needed where values serve more than one call.
        freeing: of the program, if weights that only prologues read are freed.

    Attributes:
        inputs: by position among the call's arguments, a number for the contents of each input that values came from.
        copies: by position, a copy of each of those inputs; only where weights are freed.
        weights: by position, a stamp of each weight that values came from.
        changes: how often those inputs have changed.
        fixed: values that don't depend on the timestep.
        last: the last timestep that was computed by itself, and its values.
        table: values of many timesteps, each tensor of shape [timesteps, ...].
        rows: by timestep, its row in `table`.
    """

    def __init__(
        self,
        plan: TimestepPlan | None = None,
        number: Callable[[Any], Hashable] | None = None,
        freeing: WeightFreeing | None = None,
    ) -> None:
        self.plan, self._number, self._freeing = plan or TimestepPlan(), number, freeing
        self.copies: dict[int, Any] = {}
        self.inputs: dict[int, Hashable] = {}
        self.weights: dict[int, Stamp] = {}
        self.changes = 0
        # by the positions that a variant reads: those that depend on the timestep, and the others
        self._levels: dict[tuple[int, ...], tuple[tuple[int, ...], frozenset[int]]] = {}
        self._clear()

    def _clear(self) -> None:
        self.inputs.clear()
        self.copies, self.weights = {}, {}
        self.fixed: Values = {}
        self.last: tuple[StepKey, Values] = (0.0, {})
        self.table: Values = {}
        self.rows: dict[StepKey, int] = {}

    @property
    def bytes(self) -> int:
        """Bytes of all stored values."""
        tensors = [*self.fixed.values(), *self.last[1].values(), *self.table.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def weights_changed(self, args: Sequence[Any]) -> bool:
        """Whether weights that values came from have changed; if so, all values are dropped."""
        self.last = (0.0, {})  # no stamp of its weights was taken, for these values serve one step
        if self._freeing is not None:
            args = self._freeing.freed.stored(args)
        if all(stamp.matches(args[i]) for i, stamp in self.weights.items()):
            return False
        self._clear()
        if self._freeing is not None:
            self._freeing.plans.clear()
        return True

    def is_planned(self, prologues: HasPrologues) -> bool:
        """Whether the values of all expected timesteps are computed."""
        assert self._freeing is not None
        has_steps = not prologues.of_step or (bool(self.rows) and self.rows.keys() >= set(self.plan.expected))
        return self.changes <= MAX_CHANGES and has_steps and self.fixed.keys() >= self._freeing.invariant

    def planned(self) -> PlannedValues:
        """All values, to be stored."""
        return PlannedValues(self.copies, self.weights, self.fixed, self.table, self.rows)

    def _take_planned(self, freeing: WeightFreeing, args: Sequence[Any], contents: Contents) -> None:
        """Take the stored values for the call's conditioning, if there are any."""
        plan = freeing.plan_for(args)
        if plan is None:
            return
        assert self._number is not None
        self.inputs = {i: contents[i] if i in contents else self._number(args[i]) for i in plan.inputs}
        self.copies, self.weights = plan.inputs, plan.weights
        self.fixed, self.table, self.rows = plan.fixed, plan.table, plan.rows

    def of(
        self, prologues: HasPrologues, positions: tuple[int, ...], args: Sequence[Any], timestep: StepKey | None,
        contents: Contents | None = None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """The values that a variant reads in a call, stored or computed.

        Args:
            prologues: of the call's graph.
            positions: of the values, in the graph's list of hoisted values.
            args: of the call.
            timestep: of the call, or what identifies its several timesteps. None: not known on the host.
            contents: numbers for the contents of the inputs in `self.inputs`. None: the values serve this call only.

        Returns:
            One tensor for each of `positions`.
        """
        if not positions:
            return []
        if contents is not None and any(map(ne, map(contents.get, self.inputs), self.inputs.values())):
            self.changes += 1
            self._clear()
        elif self.changes > MAX_CHANGES:
            self._clear()
        if positions not in self._levels:
            of_step = tuple(position for position in positions if prologues.hoisted[position].level == "step")
            self._levels[positions] = of_step, frozenset(positions) - frozenset(of_step)
        of_step, invariant = self._levels[positions]
        if self._freeing is not None and contents is not None:
            if not (self.fixed or self.rows):
                self._take_planned(self._freeing, args, contents)
            invariant = invariant | self._freeing.invariant
        if not invariant <= self.fixed.keys():
            self._compute_invariant(prologues, invariant, args, contents)
        values = self.fixed
        if of_step:
            values = values | self._at(prologues, of_step, args, timestep, contents)
        return list(map(values.__getitem__, positions))

    def _compute_invariant(
        self, prologues: HasPrologues, positions: Iterable[int], args: Sequence[Any], contents: Contents | None
    ) -> None:
        missing = tuple(sorted(position for position in positions if position not in self.fixed))
        variant, run = prologues.ready.get(missing) or prologues.prologue(missing, args)
        values = run(self._inputs(prologues, variant, args, contents))
        self.fixed = self.fixed | dict(zip(missing, values, strict=True))

    def _at(
        self, prologues: HasPrologues, positions: tuple[int, ...], args: Sequence[Any], timestep: StepKey | None,
        contents: Contents | None,
    ) -> Values:  # fmt: skip
        """Values that depend on the timestep: of the last call, from the table, or computed for this step alone."""
        if timestep is not None:
            if self.last[0] == timestep and self.last[1].keys() >= set(positions):
                return self.last[1]
            one_by_one = prologues.by_step and self._freeing is None
            if timestep not in self.rows and not (one_by_one or self.changes > MAX_CHANGES):
                self._fill(prologues, args, timestep, contents)
            if timestep in self.rows:
                row = self.rows[timestep]
                return {position: self.table[position][row] for position in positions}
        variant, run = prologues.ready.get(positions) or prologues.prologue(positions, args)
        values = run(self._inputs(prologues, variant, args, contents, lasting=False))
        by_position = dict(zip(positions, values, strict=True))
        if timestep is not None:
            self.last = timestep, by_position
        return by_position

    def _fill(self, prologues: HasPrologues, args: Sequence[Any], timestep: StepKey, contents: Contents | None) -> None:
        """Compute the values of this timestep and the expected ones after it, where the prologue can be mapped over
        timesteps."""
        limit = TABLE_BYTES
        if self._freeing is not None:  # the weights go when the values are there
            limit = max(limit, self._freeing.weight_bytes(args))
        limit //= max(1, prologues.step_bytes)
        following = [key for key in self.plan.after(timestep) if type(key) is type(timestep)]
        coming = tuple(dict.fromkeys(following))[:limit]
        mapped = prologues.over_steps(prologues.of_step) if len(coming) > 1 else None
        if mapped is None:
            if self._freeing is not None and coming:
                self._fill_one_by_one(prologues, args, coming, contents)
            return
        variant, run = mapped
        inputs = self._inputs(prologues, variant, args, contents)
        steps = torch.tensor(coming, dtype=torch.float64).reshape(len(coming), -1)  # [steps, timestep inputs]
        for column, position in enumerate(prologues.timesteps):
            if position in variant.takes:
                current = args[position]
                times = upload(steps[:, column].to(current.dtype), current.device)
                times = times.reshape(-1, *[1] * current.dim()).expand(-1, *current.shape)
                inputs[variant.takes.index(position)] = times
        try:
            values = run(inputs)
        except LoweringError as error:
            prologues.give_up_steps(error)
            return
        self.table = dict(zip(prologues.of_step, values, strict=True))
        self.rows = {time: row for row, time in enumerate(coming)}

    def _fill_one_by_one(
        self, prologues: HasPrologues, args: Sequence[Any], coming: Sequence[StepKey], contents: Contents | None
    ) -> None:
        """The same where the prologue can't be mapped over timesteps."""
        gives = prologues.of_step
        variant, run = prologues.ready.get(gives) or prologues.prologue(gives, args)
        inputs = self._inputs(prologues, variant, args, contents)
        steps = torch.tensor(coming, dtype=torch.float64).reshape(len(coming), -1)  # [steps, timestep inputs]
        found: list[Sequence[Any]] = []
        for step in steps:
            for time, position in zip(step.tolist(), prologues.timesteps, strict=True):
                if position in variant.takes:
                    inputs[variant.takes.index(position)] = torch.full_like(args[position], time)
            found.append(run(inputs))
        by_value = zip(*found, strict=True)
        self.table = {position: torch.stack(values) for position, values in zip(gives, by_value, strict=True)}
        self.rows = {time: row for row, time in enumerate(coming)}

    def _inputs(
        self, prologues: HasPrologues, variant: Variant, args: Sequence[Any], contents: Contents | None,
        lasting: bool = True,
    ) -> list[Any]:  # fmt: skip
        """The arguments of a prologue. The contents of the inputs among them are recorded, and a stamp of the weights
        if the prologue's values serve more than one step (`lasting`)."""
        if not self.fixed.keys() >= set(variant.hoists):
            self._compute_invariant(prologues, variant.hoists, args, contents)
        if prologues.freed and any(prologues.freed.has(args[i]) for i in variant.takes):
            args = prologues.freed.values(args)
        if contents is not None and self.changes <= MAX_CHANGES:
            assert self._number is not None
            for i in variant.takes:
                if i in prologues.condition:
                    if i not in self.inputs:
                        self.inputs[i] = contents[i] if i in contents else self._number(args[i])
                        if self._freeing is not None:
                            self.copies[i] = args[i].clone() if isinstance(args[i], torch.Tensor) else args[i]
                elif (
                    lasting
                    and i not in prologues.timesteps
                    and i not in self.weights
                    and not needs_device_sync(args[i])
                ):
                    self.weights[i] = Stamp(args[i])
        return [*map(args.__getitem__, variant.takes), *map(self.fixed.__getitem__, variant.hoists)]
