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
        gm: Dynamo's graph.
        args: of a call of the graph.
        inputs: of the graph.
        options: of the handle.
        schedule: the options' schedule as it was read for the handle; default: it is read now.
        warned: counts the warnings; default: a new one.
        captured: `gm` captured for such arguments; default: it is captured now.
        pipeline: the passes that make its programs.

    Attributes:
        analysis: the captured graph, with its regions and inputs.
        compiler: of the graph's variants.
        compiled_schedule: the handle's schedule for the graph.
        prologues: programs of the hoisted values.
        timestep, latent, condition: positions of these inputs among a call's arguments.
        buffers: for CUDA graphs, the state tensors at fixed addresses; else None.
        nodes: number of the graph's nodes.
        roles: names of the timestep and of the latent; "" where none was found.
        packs_experts: whether the experts' weights are moved side by side.

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
        facts = self.analysis.facts
        self.regions = facts.regions
        self.compiler.inputs = facts.inputs
        self.packs_experts = options.pack_experts and self._can_pack()
        self.prologues = Prologues(self.analysis, self.compiler)
        self.timestep, self.condition = self.prologues.timestep, self.prologues.condition
        self.nodes, self.roles = len(self.analysis.gm.graph.nodes), (facts.roles.timestep, facts.roles.latent)
        positions = {source.name: i for i, source in enumerate(facts.inputs)}
        self.latent = positions.get(facts.roles.latent)
        self._variants: dict[Hashable, VariantCache] = {}
        schedule = schedule or options.resolved_schedule()
        if not len(self.regions):
            if any(schedule.depth(column) for column in range(len(schedule.rows[0]))):
                raise CaptureError(_nothing_found(self.analysis))
            schedule = Schedule.full()
        if options.cuda_graphs:
            self.compiler.start_recording(args)
        self.buffers = Buffers() if options.cuda_graphs else None
        self.compiled_schedule = self.compiled(schedule)
        self.compiler.note("capture", begin, self.analysis.records)

    def compiled(
        self, schedule: Schedule, state_schedule: Schedule | None = None, order: int | None = None
    ) -> CompiledSchedule:
        """Compile a schedule for this graph. All schedules with the same state share their variants.

        Args:
            schedule: for this graph's regions, or for any graph.
            state_schedule: the schedule whose state is cached; default: `schedule`.
            order: order of forecasts, at most what that state holds; default: the schedule's.

        Raises:
            ScheduleError: the schedule is for another graph or granularity.
        """
        fitted = fit(schedule, self.regions, self.options.granularity)
        state_schedule = fit(state_schedule or schedule, self.regions, self.options.granularity)
        cache = VariantCache(self.analysis, self.compiler, state_schedule)
        cache = self._variants.setdefault((cache.layout, state_schedule.order, state_schedule.control), cache)
        return CompiledSchedule(self, fitted, cache, order)

    @property
    def schedule(self) -> Schedule:
        """The handle's schedule, fitted to this graph."""
        return self.compiled_schedule.schedule

    @property
    def layout(self) -> tuple[StateSlot, ...]:
        """The state's slots under the handle's schedule."""
        return self.compiled_schedule.layout

    def variant(self, row: Row) -> Variant:
        """The graph of a row under the handle's schedule."""
        return self.compiled_schedule.variants.variant(row)

    def place_weights(self, args: Sequence[Any]) -> None:
        """Move the expert weights among `args` side by side, if `pack_experts` asks for it; called before the first
        call."""
        if self.packs_experts:
            put_side_by_side(expert_weights(self.analysis.gm, self.analysis.facts.inputs, args))

    def _can_pack(self) -> bool:
        reason = why_not_packed(self.analysis.gm, self.analysis.facts.inputs)
        if reason:
            self.warned.once(f"pack_experts is left out: {reason}", "pack_experts")
        return not reason


def _nothing_found(analysis: Analysis) -> str:
    rejected = "; ".join(map(str, analysis.facts.rejected[:5])) or "no residual add around a matmul"
    count = len(analysis.gm.graph.nodes)
    return (
        f"nothing to cache was found in this graph ({count} nodes). Rejected candidates: {rejected}. "
        "A plain torch.compile(model) is the right tool for it; options={'schedule': 'full'} runs it uncached"
    )
