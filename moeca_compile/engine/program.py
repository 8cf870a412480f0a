"""A program: one captured graph for one input signature, and the schedules that it runs."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from moeca_compile.engine.adjacent import expert_weights, put_side_by_side
from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.engine.compiler import Compiler
from moeca_compile.engine.prologues import Prologues
from moeca_compile.engine.variant_cache import VariantCache
from moeca_compile.errors import CaptureError
from moeca_compile.graph.capture import Capture, Input
from moeca_compile.graph.fit import fit
from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.lowering.inductor.buffers import Buffers
from moeca_compile.options import Options
from moeca_compile.passes.analysis.packable import why_not_packed
from moeca_compile.pipeline import WITH_PROLOGUES, Analysis, Pipeline, analyze
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Row, Schedule


class Program:
    """One captured graph.

    Args:
        schedule: what the options' schedule said when it was read; default: it is read now.
        warned: where its warnings are counted; default: its own.
        captured: of `gm`, for such arguments; default: it is captured now.
        pipeline: the passes that make its programs.

    Attributes:
        analysis: the graph and what was found in it.
        own: the handle's schedule for it.
        timestep, latent, condition: positions among a call's arguments.
        packs_experts: whether the experts' weights lie side by side.

    Raises:
        CaptureError: the graph can't be captured, or has no region to cache.
        ScheduleError: the schedule is for another graph or granularity.
    """

    def __init__(
        self, gm: torch.fx.GraphModule, args: Sequence[Any], inputs: Sequence[Input], options: Options,
        schedule: Schedule | None = None, warned: Warned | None = None, captured: Capture | None = None,
        pipeline: Pipeline = WITH_PROLOGUES,
    ) -> None:  # fmt: skip
        begin = time.perf_counter()
        self.options, self.warned = options, warned or Warned()
        self.compiler = Compiler(options, args)
        self.analysis: Analysis = analyze(gm, args, inputs, options, captured, pipeline)
        context = self.analysis.facts
        self.regions = context.regions
        self.compiler.inputs = context.inputs
        self.packs_experts = options.pack_experts and self._can_pack()
        self.prologues = Prologues(self.analysis, self.compiler)
        self.timestep, self.condition = self.prologues.timestep, self.prologues.condition
        self.latent = {one.name: i for i, one in enumerate(context.inputs)}.get(context.roles.latent)
        self.buffers = Buffers() if self.compiler.record is not None else None
        self._variants: dict[Hashable, VariantCache] = {}
        wanted = schedule or options.resolved_schedule()
        if not len(self.regions):
            if any(wanted.depth(column) for column in range(len(wanted.rows[0]))):
                raise CaptureError(_nothing_found(self.analysis))
            wanted = Schedule.full()
        self.own = self.compiled(wanted)
        self.compiler.note("capture", begin, self.analysis.records)

    def compiled(self, schedule: Schedule, kept: Schedule | None = None, order: int | None = None) -> CompiledSchedule:
        """A schedule for this graph. Variants are shared by all schedules with the same state.

        Args:
            schedule: of this graph's regions, or for any graph.
            kept: whose state is kept; default: `schedule`'s.
            order: of forecasts, at most what that state holds; default: the schedule's.

        Raises:
            ScheduleError: it is for another graph or granularity.
        """
        fitted, kept = (fit(one, self.regions, self.options.granularity) for one in (schedule, kept or schedule))
        cache = VariantCache(self.analysis, self.compiler, kept)
        cache = self._variants.setdefault((cache.layout, kept.order, kept.control), cache)
        return CompiledSchedule(self, fitted, cache, order)

    @property
    def schedule(self) -> Schedule:
        """The handle's, fitted to this graph."""
        return self.own.schedule

    @property
    def layout(self) -> tuple[StateSlot, ...]:
        """The state's slots under the handle's schedule."""
        return self.own.layout

    def variant(self, row: Row) -> Variant:
        """The graph of a row under the handle's schedule."""
        return self.own.variants.variant(row)

    def settle(self, args: Sequence[Any]) -> None:
        """Before the first call: move the weights among `args` to where `pack_experts` wants them."""
        if self.packs_experts:
            put_side_by_side(expert_weights(self.analysis.gm, self.analysis.facts.inputs, args))

    def _can_pack(self) -> bool:
        reason = why_not_packed(self.analysis.gm, self.analysis.facts.inputs)
        if reason:
            self.warned.once(f"pack_experts is left out: {reason}", "pack_experts")
        return not reason


def _nothing_found(analysis: Analysis) -> str:
    near = "; ".join(map(str, analysis.facts.rejected[:5])) or "no residual add around a matmul"
    count = len(analysis.gm.graph.nodes)
    return (
        f"nothing to cache was found in this graph ({count} nodes). Rejected candidates: {near}. "
        "A plain torch.compile(model) is the right tool for it; options={'schedule': 'full'} runs it uncached"
    )
