"""A schedule compiled for one captured graph: the layout of its state, its variants and its step rule. Immutable."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import torch

from moeca_compile.engine.freeing.plan import WeightFreeing
from moeca_compile.engine.hoisted import HasPrologues, Hoisted
from moeca_compile.engine.trajectories.agreement import Agreement
from moeca_compile.graph.nowait import upload
from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.lowering.inductor.buffers import Buffers, zeros_of
from moeca_compile.runtime.driver import StepDriver
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Row, Schedule
from moeca_compile.schedule.forecast import MAX_KEPT, Coefficients

MAX_TABLES = 512

Run = Callable[[Sequence[Any]], Sequence[Any]]


class StepCompiler(Protocol):
    """What a step asks of a compiler: seconds spent so far, and the lock of a replay. See `engine/compiler.py`."""

    spent: float
    replaying: AbstractContextManager[Any]


class Variants(Protocol):
    """The variants of one graph by row: compiled when a row first needs them, or loaded. See
    `engine/variant_cache.py`."""

    layout: tuple[StateSlot, ...]
    built: dict[Row, Variant]
    executables: dict[Row, Run]

    def variant(self, row: Row) -> Variant: ...
    def compile(self, variant: Variant, args: Sequence[Any]) -> Run: ...
    def compile_together(self, variants: Iterable[tuple[Variant, Sequence[Any]]]) -> None: ...


class StepProgram(Protocol):
    """What a step needs to know of a program, captured or loaded. See `engine/program.py`."""

    warned: Warned
    timestep: int | None
    more_timesteps: tuple[int, ...]
    latent: int | None
    condition: tuple[int, ...]
    caches: tuple[int, ...]
    buffers: Buffers | None
    key: Hashable
    freeing: WeightFreeing | None
    agreement: Agreement | None

    @property
    def compiler(self) -> StepCompiler: ...
    @property
    def prologues(self) -> HasPrologues: ...


class CompiledSchedule:
    """A schedule that `run_step` runs.

    Args:
        program: of the graph.
        schedule: fitted to the graph's regions.
        variants: of the graph, with the state that the schedule reads.
        order: order of forecasts, at most what the state holds; default: the schedule's.

    Attributes:
        driver: the step rule.
        layout: slots of the state.
        device: of the state; the CPU without state.
    """

    def __init__(self, program: StepProgram, schedule: Schedule, variants: Variants, order: int | None = None) -> None:
        self.program, self.schedule, self.variants = program, schedule, variants
        self.driver = StepDriver(schedule, program.warned, order, program.agreement)
        self.layout: tuple[StateSlot, ...] = variants.layout
        self.device = torch.device(self.layout[0].device) if self.layout else torch.device("cpu")
        self._tables: dict[Hashable, torch.Tensor] = {}
        self._zeros: dict[Hashable, torch.Tensor] = {}

    def state(self) -> StreamState:
        """The empty state of a new stream."""
        regions = len(self.driver.full)
        buffers = self.program.buffers
        return StreamState(self.layout, regions) if buffers is None else buffers.state(self.layout, regions)

    def zeros(self, slot: int) -> torch.Tensor:
        """The value of a slot that is read and wasn't written. Slots of one shape, dtype and device share a tensor."""
        spec = self.layout[slot]
        kind = (spec.shape, spec.dtype, spec.device)
        if kind not in self._zeros:
            self._zeros[kind] = zeros_of(spec)
        return self._zeros[kind]

    def arguments(
        self, variant: Variant, args: Sequence[Any], state: StreamState | None, step: int,
        hoisted: Sequence[torch.Tensor] | None = None,
    ) -> list[Any]:  # fmt: skip
        """The arguments of a variant: inputs, hoisted values, state, coefficients.

        Args:
            variant: that runs.
            args: of the call.
            state: of the stream; a slot that wasn't written reads as zeros. None: the call is in no stream.
            step: number of the call, from 0.
            hoisted: one for each of `variant.hoists`; None: they are computed for this call.
        """
        arguments = list(map(args.__getitem__, variant.takes))
        if hoisted is None:
            hoisted = Hoisted().of(self.program.prologues, variant.hoists, args, None)
        arguments += hoisted
        if variant.changes and state is not None:
            self._own(state, variant.changes)
        for slot in variant.reads:
            tensor = None if state is None else state.tensors[slot]
            if tensor is None and slot in variant.changes:
                tensor = zeros_of(self.layout[slot])
            arguments.append(self.zeros(slot) if tensor is None else tensor)
        # a table is uploaded without waiting: another stream of the device could read it too early
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        if variant.wants_now:
            now = self._tables.get((stream, step))
            arguments.append(self._upload((stream, step), float(step + 1)) if now is None else now)
        if variant.wants_coefficients:
            assert state is not None  # without state the row is full, and a full row has no forecast
            key = stream, self.driver.coefficients_key(state, step)
            table = self._tables.get(key)
            arguments.append(self._upload(key, self.driver.coefficients(state, step)) if table is None else table)
        return arguments

    def _own(self, state: StreamState, slots: Sequence[int]) -> None:
        """Let these slots have tensors of their own, which may be changed in place: what wasn't written is zeros, and a
        program may have handed out one tensor for two slots."""
        found = set[int]()
        for slot in slots:
            tensor = state.tensors[slot]
            if tensor is None:
                tensor = state.tensors[slot] = zeros_of(self.layout[slot])
            elif tensor.data_ptr() in found:
                tensor = state.tensors[slot] = tensor.clone()
            found.add(tensor.data_ptr())

    def warm(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Compile every distinct row for inputs like `args`. No state is kept.

        Returns:
            The outputs of the full row for `args`.
        """
        rows, hoisted = self.schedule.distinct_rows(), Hoisted()

        @cache  # called twice for each row, and hoisted values are computed once
        def example(row: Row) -> tuple[Variant, list[Any]]:
            variant = self.variants.variant(row)
            return variant, self.examples(variant, args, hoisted)

        self.variants.compile_together(map(example, rows))
        outputs: tuple[Any, ...] = ()
        for variant, examples in map(example, rows):
            results = self.variants.compile(variant, examples)(examples)
            outputs = outputs or tuple(results[: variant.outputs - len(self.program.caches)])
        return outputs

    def examples(self, variant: Variant, args: Sequence[Any], hoisted: Hoisted) -> list[Any]:
        """Example arguments of a variant, for inputs like `args`."""
        examples = [
            *(args[i] for i in variant.takes),
            *hoisted.of(self.program.prologues, variant.hoists, args, None),
            *(zeros_of(self.layout[slot]) if slot in variant.changes else self.zeros(slot) for slot in variant.reads),
        ]
        if variant.wants_now:
            examples.append(torch.ones((), device=self.device))
        if variant.wants_coefficients:
            examples.append(torch.zeros(len(self.driver.full), MAX_KEPT, device=self.device))
        return examples

    def _upload(self, key: Hashable, values: Coefficients | float) -> torch.Tensor:
        """Copy values to the device as float32, and cache the tensor under `key`, what they depend on. The host
        doesn't wait for the device."""
        if len(self._tables) >= MAX_TABLES:
            self._tables.clear()
        table = self._tables[key] = upload(torch.tensor(values, dtype=torch.float32), self.device)
        return table
