"""A program: one captured graph for one input signature, and the schedules that it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Any

import torch

from moeca_compile.engine.adjacent import expert_weights, put_side_by_side
from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.engine.compiler import Compiler
from moeca_compile.engine.freeing.plan import WeightFreeing
from moeca_compile.engine.freeing.weights import FreedWeights
from moeca_compile.engine.prologues import Prologues
from moeca_compile.engine.trajectories.agreement import Agreement, agreement_of
from moeca_compile.engine.variant_cache import VariantCache
from moeca_compile.errors import CaptureError
from moeca_compile.graph.autocast import autocast_is
from moeca_compile.graph.capture import Capture, Input, capture
from moeca_compile.graph.fit import fit
from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.lowering.inductor.buffers import Buffers
from moeca_compile.lowering.inductor.sizes.shared import SharedSizes
from moeca_compile.options import Options
from moeca_compile.passes.analysis.packable import why_not_packed
from moeca_compile.passes.facts import Facts
from moeca_compile.pipeline import WITH_PROLOGUES, Analysis, Pipeline, analyze
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Row, Schedule

OtherSize = Callable[[], Sequence[Any] | None]


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
        key: equal for graphs that compute the same from other weights; default: equal to no other.
        freed: the freed weights of the handle; None: none will be freed.
        sizes: programs of the handle that serve several sizes; None: variants are compiled for this size alone.
        other: makes arguments of another size that the graph may be called with, fake tensors among them; gives None:
            every size is fixed.

    Attributes:
        analysis: the captured graph, with its regions and inputs.
        compiler: of the graph's variants.
        compiled_schedule: the handle's schedule for the graph.
        prologues: programs of the hoisted values.
        agreement: of the ranks that share the graph's collectives; None: it has none.
        freeing: frees weights that only they read; None: `free_hoisted` isn't set.
        timestep, latent, condition: positions of these inputs among a call's arguments.
        more_timesteps: positions of further timesteps.
        caches: positions of the inputs that the model overwrites in place; their new values follow its results.
        buffers: for CUDA graphs, the state tensors at fixed addresses; else None.
        nodes: number of the graph's nodes.
        roles: names of the timestep and of the latent; "" where none was found.
        packs_experts: whether the experts' weights are moved side by side.
        latent_shape: of one sample's latent; empty where none was found.
        is_announced: its summary was logged, or won't be.

    Raises:
        CaptureError: the graph can't be captured, or has no region to cache.
        ScheduleError: the schedule is for another graph or granularity.
    """

    def __init__(
        self, gm: torch.fx.GraphModule, args: Sequence[Any], inputs: Sequence[Input], options: Options,
        schedule: Schedule | None = None, warned: Warned | None = None, captured: Capture | None = None,
        pipeline: Pipeline = WITH_PROLOGUES, key: Hashable = None, freed: FreedWeights | None = None,
        sizes: SharedSizes | None = None, other: OtherSize = lambda: None,
    ) -> None:  # fmt: skip
        begin = time.perf_counter() if captured is None else captured.began
        freed = freed if options.free_hoisted else None
        self.options, self.warned, self.is_announced = options, warned or Warned(), False
        self.key = object() if key is None else key
        self.compiler = Compiler(options, args, sizes)
        self.analysis: Analysis = analyze(gm, args, inputs, options, captured, pipeline)
        facts = self.analysis.facts
        self._at_other_size = cache(partial(_analyzed_at, other, gm, inputs, options, pipeline, facts))
        self.regions = facts.regions
        self.compiler.inputs = facts.inputs
        self.agreement: Agreement | None = agreement_of(self.analysis.gm, args)
        self.packs_experts = options.pack_experts and self._can_pack()
        self.prologues = Prologues(self.analysis, self.compiler, freed)
        self.timestep = next(iter(self.prologues.timesteps), None)
        self.more_timesteps, self.condition = self.prologues.timesteps[1:], self.prologues.condition
        self.nodes, self.roles = len(self.analysis.gm.graph.nodes), (facts.roles.timestep, facts.roles.latent)
        positions = {source.name: i for i, source in enumerate(facts.inputs)}
        self.latent = positions.get(facts.roles.latent)
        self.latent_shape = shape_of_sample(args, self.latent)
        self.caches = tuple(positions[name] for name in facts.caches)
        self._variants: dict[Hashable, VariantCache] = {}
        schedule = schedule or options.resolved_schedule()
        if self.caches and self.timestep is None:  # a call that fills the caches with a prompt, or one of text
            schedule = Schedule.full()
        if not len(self.regions):
            if any(schedule.depth(column) for column in range(len(schedule.rows[0]))):
                raise CaptureError(_nothing_found(self.analysis))
            schedule = Schedule.full()
        if options.cuda_graphs:
            self.compiler.start_recording(args)
        self.buffers = Buffers() if options.cuda_graphs else None
        self.warn_of_size(schedule)
        self.compiled_schedule = self.compiled(schedule.with_interval(self._cheap_share(schedule)))
        self.freeing = None if freed is None else WeightFreeing(freed, self.prologues, self.compiled_schedule)
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
        cache = VariantCache(self.analysis, self.compiler, state_schedule, self._at_other_size)
        cache = self._variants.setdefault((cache.layout, state_schedule.order, state_schedule.control), cache)
        return CompiledSchedule(self, fitted, cache, order)

    def _cheap_share(self, schedule: Schedule) -> float:
        """MACs of the last of a schedule's kinds of step / MACs of a computed step, for a schedule with `speedup`."""
        if schedule.speedup is None:
            return 0.0
        compiled = self.compiled(schedule)
        macs = [compiled.variants.variant(row).macs for row in compiled.schedule.distinct_rows()]
        return macs[-1] / macs[0]

    def warn_of_size(self, schedule: Schedule) -> None:
        """Warn if the schedule was calibrated with latents of another size."""
        if schedule.latent and self.latent_shape and schedule.latent != self.latent_shape:
            self.warned.once(
                f"the schedule was calibrated with a latent of {list(schedule.latent)} for each sample, this call's is "
                f"{list(self.latent_shape)}: at this size its quality isn't known. Calibrate at this size "
                "(moeca_compile.calibrate), measure this schedule (moeca_compile.compare), or use a uniform one"
            )

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


def shape_of_sample(args: Sequence[Any], latent: int | None) -> tuple[int, ...]:
    """Shape of the argument at the position `latent`, without its batch; empty: there is none."""
    return () if latent is None else tuple(args[latent].shape[1:])


def _analyzed_at(
    other: OtherSize, gm: torch.fx.GraphModule, inputs: Sequence[Input], options: Options,
    pipeline: Pipeline, facts: Facts,
) -> Analysis | None:  # fmt: skip
    """The analysis of a graph at another size, under the same autocasts; None: every size is fixed."""
    args = other()
    if args is None:
        return None
    with autocast_is(facts.autocast):
        captured = capture(gm, args, inputs, with_caches=bool(facts.caches))
        return analyze(gm, args, inputs, options, captured, pipeline)


def _nothing_found(analysis: Analysis) -> str:
    rejected = "; ".join(map(str, analysis.facts.rejected[:5])) or "no residual add around a matmul"
    count = len(analysis.gm.graph.nodes)
    return (
        f"nothing to cache was found in this graph ({count} nodes). Rejected candidates: {rejected}. "
        "A plain torch.compile(model) is the right tool for it; options={'schedule': 'full'} runs it uncached"
    )
