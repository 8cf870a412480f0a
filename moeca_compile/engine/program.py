"""A program: one captured graph for one input signature, with its schedule bound and its variants built when needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import Any

import torch

from moeca_compile.engine.adjacent import expert_weights, put_side_by_side
from moeca_compile.engine.hoisted import Hoisted
from moeca_compile.engine.prologues import Prologues
from moeca_compile.errors import CaptureError, OptionError
from moeca_compile.graph.autocast import autocast_is, without_autocast
from moeca_compile.graph.capture import Capture, Input, under_compile_lock
from moeca_compile.graph.fit import fit
from moeca_compile.graph.variant import SLOTS, Variant
from moeca_compile.lowering.inductor.ahead import ask_compiler, compiles_on_cpu
from moeca_compile.lowering.inductor.buffers import Buffers, zeros_of
from moeca_compile.lowering.inductor.kernels import kernels_later
from moeca_compile.lowering.inductor.lower import Executable, lower_eager, lower_inductor
from moeca_compile.lowering.inductor.replay import RECORDERS, Record, Replayed
from moeca_compile.options import Options
from moeca_compile.passes.analysis.packable import why_not_packed
from moeca_compile.passes.manager import PassRecord
from moeca_compile.passes.transform.layout import state_layout
from moeca_compile.pipeline import LOWER, Analysis, analyse, build_variant
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Row, Schedule


class Program:
    """Implements `runtime.dispatch.Runnable`.

    Args:
        schedule: what the options' schedule said when it was read; default: it is read now.
        warned: where its warnings are counted; default: its own.
        captured: of `gm`, for such arguments; default: it is captured now.

    Raises:
        CaptureError: the graph can't be captured, or has no region to cache.
        ScheduleError: the schedule is for another graph or granularity.
    """

    def __init__(
        self, gm: torch.fx.GraphModule, args: Sequence[Any], inputs: Sequence[Input], options: Options,
        schedule: Schedule | None = None, warned: Warned | None = None, captured: Capture | None = None,
    ) -> None:  # fmt: skip
        begin = time.perf_counter()
        self._writes_kernels = options.inner == "inductor" and compiles_on_cpu(args)
        if self._writes_kernels:
            ask_compiler()
        self.options = options
        self.analysis: Analysis = analyse(gm, args, inputs, options, captured)
        context = self.analysis.context
        self.regions = context.regions
        self.warned = warned or Warned()
        self.packs_experts = options.pack_experts and self._can_pack()
        self.prologues = Prologues(self.analysis, options, self._lower, self._built)
        wanted = schedule or options.resolved_schedule()
        if not len(self.regions):
            if any(wanted.depth(column) for column in range(len(wanted.rows[0]))):
                raise CaptureError(_nothing_found(self.analysis))
            wanted = type(wanted).full()
        self._books: dict[Any, tuple[dict[Row, Variant], dict[Row, Executable]]] = {}
        self.use(wanted)
        positions = {one.name: i for i, one in enumerate(context.inputs)}
        self.latent = positions.get(context.roles.latent)
        self.timestep, self.condition = self.prologues.timestep, self.prologues.condition
        self.records: list[PassRecord] = list(self.analysis.records)
        self.compile_seconds = {"capture": time.perf_counter() - begin}
        self._zeros: dict[tuple[Any, ...], torch.Tensor] = {}
        self._buffers = Buffers()
        self._record = self._recorder(args) if options.cuda_graphs else None
        self.replaying: AbstractContextManager[Any] = nullcontext() if self._record is None else threading.RLock()

    def use(self, schedule: Schedule, keep: Schedule | None = None) -> None:
        """Run another schedule from now on, with the state of `keep` (default: its own). Variants are kept by layout.

        Raises:
            ScheduleError: it is for another graph or granularity.
        """
        self.schedule, self._kept = (
            fit(one, self.regions, self.options.granularity) for one in (schedule, keep or schedule)
        )
        self.layout = state_layout(self.regions, self._kept)
        self._full_macs = 0
        book = (self.layout, self._kept.order, self._kept.control)
        self._variants, self._executables = self._books.setdefault(book, ({}, {}))

    @property
    def full_macs(self) -> int:
        """Of a call that computes everything."""
        self._full_macs = self._full_macs or self.variant(self.schedule.rows[0]).macs
        return self._full_macs

    def settle(self, args: Sequence[Any]) -> None:
        """Before the first call: move the weights among `args` to where `pack_experts` wants them."""
        if self.packs_experts:
            put_side_by_side(expert_weights(self.analysis.gm, self.analysis.context.inputs, args))

    def variant(self, row: Row) -> Variant:
        """The graph of `row`, built on first use; nothing is compiled yet."""
        if row not in self._variants:
            with under_compile_lock():
                begin, name = time.perf_counter(), f"v{len(self._variants)}"
                variant, records = build_variant(self.analysis, self._kept, row, self.options, name)
                self._variants[row] = variant
                self._built(name, begin, records)
        return self._variants[row]

    def executable(self, row: Row) -> tuple[Variant, Executable | None]:
        return self.variant(row), self._executables.get(row)

    def compile(self, variant: Variant, args: Sequence[Any]) -> Executable:
        """Compile `variant` for tensors like `args`.

        Raises:
            LoweringError: the inner compiler refused it.
        """
        with under_compile_lock():
            if variant.row not in self._executables:
                self._executables[variant.row] = self._lower(variant, args)
        return self._executables[variant.row]

    def _lower(self, variant: Variant, args: Sequence[Any], often: bool = True) -> Executable:
        """`often`: it runs at many steps of a trajectory, so that compiling and recording it pays."""
        begin = time.perf_counter()
        if self.options.inner == "eager" or not often:
            run = lower_eager(variant)
        else:
            with autocast_is(()):
                passes = [one for one in LOWER if one.__name__ not in self.options.disable]
                run = lower_inductor(variant, args, self.options.mode, self.options.inner_options, passes)
        self._spent(variant.name, begin)
        run = without_autocast(run)
        if self._record is None or not often:
            return run
        return Replayed(run, variant.name, self._moving(variant, len(args)), self._record, variant.outputs)

    def _moving(self, variant: Variant, count: int) -> set[int]:
        """Which of a variant's `count` arguments are other tensors at each call: all but weights and state."""
        inputs = [position for position, i in enumerate(variant.takes) if not self.analysis.context.inputs[i].is_weight]
        first = len(variant.takes) + len(variant.hoists)
        return {*inputs, *range(len(variant.takes), first), *range(first + len(variant.reads), count)}

    def _recorder(self, args: Sequence[Any]) -> Record:
        devices = {one.device.type for one in args if isinstance(one, torch.Tensor)}
        found = RECORDERS.get(next(iter(devices))) if len(devices) == 1 else None
        if found is None:
            raise OptionError(
                f"cuda_graphs=True, but this call's tensors are on {', '.join(sorted(devices)) or 'no device'}: leave "
                "it out, or move the model and all its inputs to a GPU"
            )
        return found

    def state(self) -> StreamState:
        """A new stream's, empty."""
        regions = len(self.schedule.rows[0])
        return StreamState(self.layout, regions) if self._record is None else self._buffers.state(self.layout, regions)

    def zeros(self, slot: int) -> torch.Tensor:
        """What an unwritten slot reads as; one tensor serves all slots of a kind, for variants never write in place."""
        one = self.layout[slot]
        kind = (one.shape, one.dtype, one.device)
        if kind not in self._zeros:
            self._zeros[kind] = zeros_of(one)
        return self._zeros[kind]

    def warm(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Compile every distinct row for inputs like `args`; returns the all-COMPUTE outputs. No state is kept."""
        rows, hoisted = self.schedule.distinct_rows(), Hoisted()

        @cache  # asked for twice, and what is hoisted would be computed twice
        def example(row: Row) -> tuple[Variant, list[Any]]:
            variant = self.variant(row)
            return variant, self._examples(variant, args, hoisted)

        self.compile_together(map(example, rows))
        outputs: tuple[Any, ...] = ()
        for variant, given in map(example, rows):
            results = self.compile(variant, given)(given)
            outputs = outputs or tuple(results[: variant.outputs])
        return outputs

    def compile_together(self, wanted: Iterable[tuple[Variant, Sequence[Any]]]) -> None:
        """Compile variants, each for tensors like those beside it, so that the C++ compiler works on the kernels of one
        while the next is lowered. If anything is refused none is kept: compiled by itself, each says what is wrong."""
        if not self._writes_kernels:
            return
        made: dict[Row, Executable] = {}
        with under_compile_lock(), suppress(Exception), kernels_later() as wait:
            for variant, args in wanted:
                if variant.row not in self._executables:
                    made[variant.row] = self._lower(variant, args)
            begin = time.perf_counter()
            wait()
            self._spent("kernels", begin)
            self._executables.update(made)  # not before: other threads run what they find there

    def _examples(self, variant: Variant, args: Sequence[Any], hoisted: Hoisted) -> list[Any]:
        """Arguments for `variant` as a step has them, for inputs like `args`."""
        examples = [
            *(args[i] for i in variant.takes),
            *hoisted.of(self.prologues, variant.hoists, args, None),
            *(self.zeros(slot) for slot in variant.reads),
        ]
        if variant.wants_now:
            examples.append(torch.ones((), device=self.layout[0].device))
        if variant.wants_coefficients:
            examples.append(torch.zeros(len(self.regions), len(SLOTS) - 1, device=self.layout[0].device))
        return examples

    def _can_pack(self) -> bool:
        reason = why_not_packed(self.analysis.gm, self.analysis.context.inputs)
        if reason:
            self.warned.once(f"pack_experts is left out: {reason}", "pack_experts")
        return not reason

    def _built(self, name: str, begin: float, records: Sequence[PassRecord]) -> None:
        self.records += records
        self._spent(name, begin)

    def _spent(self, name: str, begin: float) -> None:
        self.compile_seconds[name] = self.compile_seconds.get(name, 0.0) + time.perf_counter() - begin


def _nothing_found(analysis: Analysis) -> str:
    near = "; ".join(str(miss) for miss in analysis.context.rejected[:5]) or "no residual add around a matmul"
    count = len(analysis.gm.graph.nodes)
    return (
        f"nothing to cache was found in this graph ({count} nodes). Rejected candidates: {near}. "
        "A plain torch.compile(model) is the right tool for it; options={'schedule': 'full'} runs it uncached"
    )
