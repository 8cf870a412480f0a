"""A denoising loop over a compiled model whose state is in a pool and whose steps share calls."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from moeca_compile.engine.batched.call import PlannedCall
from moeca_compile.engine.batched.forms import Forms
from moeca_compile.engine.hoisted import Hoisted
from moeca_compile.engine.step import is_finite
from moeca_compile.engine.trajectories.timesteps import EPS
from moeca_compile.engine.trajectory_state import Stream, TrajectoryState
from moeca_compile.errors import StateError
from moeca_compile.graph.content import Contents
from moeca_compile.runtime.batched.pool import PooledState, StatePool
from moeca_compile.runtime.stats import StepRecord
from moeca_compile.runtime.trajectory import Loop

# what a call gives one request: new values of the slots that it writes, and the model's result
Values = tuple[Sequence[torch.Tensor], Any]


class Generations(TrajectoryState):
    """The state of all requests of a batched model; each is a stream, by its number.

    Attributes:
        generation: how often all state was dropped, because weights changed or the model was reset.
    """

    generation = 0

    def forget(self) -> None:
        """Drop all state: the next step of each request is cold."""
        super().forget()
        self.generation += 1


class Owner(Protocol):
    """What a loop needs of the batched model."""

    forms: Forms
    pool: StatePool
    running: Generations
    timestep: int | None
    condition: tuple[int, ...]

    def admit(self, inputs: Any) -> tuple[list[Any], int]: ...
    def serve(self, trajectory: Any, inputs: Any) -> Any: ...
    def leave(self, trajectory: Any) -> None: ...


class PooledLoop(Loop):
    """One denoising loop, or one guidance stream of it. A context manager; leaving it drops the state.

    `run` waits until its step was part of a call. So each of several loops needs a thread of its own.

    Attributes:
        steps: how many calls are expected; None: any number.
        stream: a name for the records.
        lanes: the first lane of the pool, and how many; None: it has none yet, or none any more.
    """

    def __init__(self, owner: Owner, number: int, steps: int | None, stream: str) -> None:
        super().__init__(steps, stream or str(number))
        self.lanes: tuple[int, int] | None = None
        self._owner, self._number = owner, number
        self._contents, self._read = Contents(), list[Hashable]()

    def run(self, inputs: Any) -> Any:
        """Run the next step.

        Args:
            inputs: of the model, as those of the example: a tuple, or a mapping of keywords. The batch is that of the
                first step.

        Returns:
            What the model returns for them.

        Raises:
            StateError: inputs that the model doesn't take, one step too many, another batch than before, a closed loop,
                or a second thread.
        """
        return self._run_alone(inputs)

    def close(self) -> None:
        """Drop the state, give the lanes back and refuse further calls."""
        super().close()
        self._streams.pop(self._number, None)
        self._owner.leave(self)

    def _run(self, inputs: Any) -> Any:
        return self._owner.serve(self, inputs)

    def plan(self, inputs: Any) -> PlannedCall:
        """Find what the next step runs. Nothing is kept until `commit`: a step may be planned again.

        Args:
            inputs: as for `run`.

        Raises:
            StateError: as `run`.
        """
        self._refuse_closed()
        home, step = self._owner.forms.home, self._step + 1
        home.driver.refuse_surplus(step, self.steps, self.stream)
        leaves, batch = self._owner.admit(inputs)
        generation = self._owner.running.generation
        stream = self._streams.get(self._number) or self._new_stream(batch)
        assert self.lanes is not None  # a step is planned when its trajectory has lanes
        if batch != (room := self.lanes[1]):
            raise StateError(f"the trajectory has room for batch {room}, this call has {batch}: open another one")
        self._drop_hoisted_if_other(stream, leaves)
        timestep, eps = self._timestep(leaves) if home.schedule.timesteps else (None, 0.0)
        row, cold = home.driver.choose(stream.state, step, timestep, eps)
        variant = home.variants.variant(row)
        return PlannedCall(step, row, cold, variant, leaves, batch, timestep, stream, generation)

    def commit(self, planned: PlannedCall, values: Values, ms: float) -> Any:
        """Keep what a planned step wrote.

        Args:
            planned: what `plan` gave last.
            values: of the call.
            ms: milliseconds that it took.

        Returns:
            The model's result.
        """
        begin = time.perf_counter()
        (written, result), driver, variant = values, self._owner.forms.home.driver, planned.variant
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        changed = bool(variant.changes)
        finite = is_finite(tensors[0]) if variant.writes or changed else True
        driver.keep(planned.stream.state, planned.step, planned.row, variant.writes, written, finite, changed)
        self._step = planned.step
        full, overhead = self._owner.forms.home.variants.variant(driver.full), (time.perf_counter() - begin) * 1e3
        record = StepRecord(
            planned.step, self.stream, variant.name, ms, overhead, variant.macs, planned.cold, 0, full.macs,
            planned.timestep,
        )  # fmt: skip
        self._records.append(record)
        self._owner.running.records.append(record)
        return result

    @property
    def _streams(self) -> dict[Hashable, Stream]:
        return self._owner.running.of(self._owner.forms.home).streams

    def _new_stream(self, batch: int) -> Stream:
        assert self.lanes is not None
        home, pool = self._owner.forms.home, self._owner.pool
        layout = tuple(replace(slot, bytes=slot.bytes * batch) for slot in home.layout)
        state = PooledState(layout, pool, *self.lanes)
        stream = self._streams[self._number] = Stream(state, Hoisted())
        return stream

    def _drop_hoisted_if_other(self, stream: Stream, leaves: Sequence[Any]) -> None:
        """Drop the hoisted values if the inputs that they came from hold something else."""
        tensors = [leaves[i] for i in self._owner.condition]
        numbers = [self._contents.number(value) for value in tensors if isinstance(value, torch.Tensor)]
        if numbers != self._read:
            stream.hoisted.fixed = {}
            self._contents.keep(numbers)
            self._read = list(numbers)

    def _timestep(self, leaves: Sequence[Any]) -> tuple[float | None, float]:
        """The call's timestep, of several tokens' the middle one, and the spacing of its dtype. None: the call has
        none, it isn't finite, or it differs between the samples."""
        value = None if self._owner.timestep is None else leaves[self._owner.timestep]
        if not isinstance(value, torch.Tensor):
            return None, 0.0
        times, eps = value.detach().double().cpu(), EPS.get(value.dtype, 0.0)
        if not times.numel() or not times.isfinite().all() or (times.dim() and bool((times != times[:1]).any())):
            return None, eps
        return float(times.reshape(-1).sort().values[times.numel() // 2]), eps
