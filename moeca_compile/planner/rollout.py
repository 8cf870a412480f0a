"""Rollouts: runs of a sampler with different schedules; each run is a trajectory of its own.

The sampler is the caller's own loop. A rollout replaces only what a call of the compiled model does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from moeca_compile.api import compile as moeca_compile_model
from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.engine.handle_runtime import HandleRuntime
from moeca_compile.engine.intercept import Interceptor, intercepting
from moeca_compile.engine.program import Program
from moeca_compile.engine.step import run_step
from moeca_compile.engine.trajectories.blocks import current
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.engine.trajectory_state import TrajectoryState
from moeca_compile.errors import ScheduleError
from moeca_compile.frontend.entry import Entry
from moeca_compile.frontend.model_arguments import models_of, plain_module, swapped_in
from moeca_compile.frontend.owner import handle_of
from moeca_compile.planner.origin import Origin, origin_of
from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.planner.search.rows import FULL, Kinds, Plan, row_kinds, row_of, with_partial
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.stats import StepRecord
from moeca_compile.schedule import Schedule

Sampler = Callable[..., torch.Tensor]  # (model, seed), and keywords if it takes some
TIMESTEPS = "timesteps"  # the keyword of a sampler that lets others choose where its steps lie


@dataclass(frozen=True)
class Call:
    """One finished call of the model in a rollout.

    Attributes:
        compiled: the schedule that ran.
        stream: the guidance stream, as "stream of the sampler's trajectory/stream of the call".
        record: of the step.
        state: of the stream after the call; None: the step of the call is unknown, so it was computed in full.
        args: the inputs of the graph.
        results: the outputs of the graph.
    """

    compiled: CompiledSchedule
    stream: str
    record: StepRecord
    state: StreamState | None
    args: Sequence[Any]
    results: Sequence[Any]

    @property
    def program(self) -> Program:
        """The graph that ran."""
        program = self.compiled.program
        assert isinstance(program, Program)
        return program

    @property
    def is_computed(self) -> bool:
        """Whether the step computed the first region, as far as its number is known."""
        return self.state is not None and self.state.history[0][:1] == (self.record.step,)

    @property
    def latent(self) -> torch.Tensor | None:
        """The latent among the inputs; None: the graph has none."""
        return None if self.program.latent is None else self.args[self.program.latent]

    @property
    def timestep(self) -> float | None:
        """The call's timestep as the clock took it, or else that of its first sample; None: the graph has none."""
        if self.record.timestep is not None or self.program.timestep is None:
            return self.record.timestep
        return float(torch.as_tensor(self.args[self.program.timestep]).reshape(-1)[0])


Watch = Callable[[Call], tuple[Any, ...] | None]


class Rollout:
    """One run of a sampler. Each graph runs the schedule that `compile_for` returns.

    Args:
        compile_for: called once for each graph.
        watch: called after each call of the model. If it returns results, the sampler receives them instead.
        within: entered around each call of the model.
        hands_over: a model's first step uses the state of the model before it.

    Attributes:
        schedules: of the graphs that ran.
        running: the state of each trajectory; the key None is for calls outside a trajectory of the sampler.
    """

    def __init__(
        self, compile_for: Callable[[Program], CompiledSchedule], watch: Watch | None = None,
        within: AbstractContextManager[object] | None = None, hands_over: bool = False,
    ) -> None:  # fmt: skip
        self._compile_for, self._watch, self._within = compile_for, watch, within or nullcontext()
        self._hands_over = hands_over
        self.schedules: dict[Program, CompiledSchedule] = {}
        self.running: dict[Trajectory | None, TrajectoryState] = {}

    def __call__(self, entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
        program, args = entry.place(args, runtime)
        if program not in self.schedules:
            self.schedules[program] = self._compile_for(program)
        compiled, trajectory = self.schedules[program], current(runtime.ids)
        if trajectory not in self.running:
            self.running[trajectory] = TrajectoryState(trajectory or Trajectory(()), hands_over=self._hands_over)
        running = self.running[trajectory]
        with self._within:
            results = run_step(compiled, running, args, trajectory)
        if self._watch is None:
            return results
        record = running.records[-1]
        streams = running.of(compiled).streams.items()
        state = next((stream.state for name, stream in streams if str(name) == record.stream), None)
        name = f"{trajectory.stream if trajectory is not None else None}/{record.stream}"
        replacement = self._watch(Call(compiled, name, record, state, args, results))
        return results if replacement is None else replacement

    @property
    def steps(self) -> int:
        """The number of steps of the longest trajectory."""
        records = [record for running in self.running.values() for record in running.records]
        return max((1 + record.step for record in records), default=0)


class StopRun(BaseException):
    """Ends a run early. It is not an Exception, so handlers in a sampler do not catch it."""


class SampledModel:
    """One compiled model and its sampler; or the transformers that take turns in one loop.

    Args:
        model: as `moeca_compile.compile` takes it.
        sample: the caller's loop.
        granularity: as in `Options`.
        inner: as in `Options`.
        caching: the schedule whose state every plan keeps. None: whole regions, with one layout for all orders. If it
            names its regions, its last row is PARTIAL: every region that a plan does not compute takes its action from
            that row, and every forecast has its order.

    Attributes:
        handles: the compiled models.
        steps: of a trajectory; set by the first uncached run.
        seconds: of the runs so far, without compiling. Processor time if the model runs on the CPU, so that other
            processes do not count.
        uncached: seconds of each uncached run.
    """

    def __init__(
        self, model: Any, sample: Sampler, granularity: str, inner: str, caching: Schedule | None = None
    ) -> None:
        self.sample, self.granularity = sample, granularity
        self.caching = caching or Schedule.uniform(2, order=2)
        self._argument, modules = model, [plain_module(part) for part in models_of(model, "calibrate")]
        callers_compiled_calls = [module._compiled_call_impl for module in modules]
        self.handles: list[Any] = moeca_compile_model(
            modules, schedule=self.caching, inner=inner, granularity=granularity
        )
        for module, compiled_call in zip(modules, callers_compiled_calls, strict=True):
            if compiled_call is not None:
                module._compiled_call_impl = compiled_call
        self._programs: list[Program] = []
        self.steps = 0
        self.seconds = 0.0
        self.uncached: list[float] = []
        weights = [weight for module in modules for weight in module.parameters()]
        on_cpu = all(weight.device.type == "cpu" for weight in weights)
        self.clock = time.process_time if on_cpu else time.perf_counter

    @property
    def program(self) -> Program:
        """The graph with the most regions; known after the first run. The other graphs run the same plans."""
        return max(self._programs, key=lambda program: len(program.regions))

    def is_main(self, program: Program) -> bool:
        """Whether it is `program`, or computes the same from the weights of another transformer of the loop."""
        return program.key == self.program.key

    @property
    def kinds(self) -> Kinds:
        """The row kinds of `program`."""
        return self._kinds(self.program)

    @property
    def caches_branches(self) -> bool:
        """Whether rows that do not compute the experts compute some expert branches."""
        return self.caching.regions is not None

    def _kinds(self, program: Program) -> Kinds:
        kinds = kinds_of(program)
        return with_partial(kinds, self.caching.rows[-1]) if self.caches_branches else kinds

    def run(
        self, seed: int, plan: Plan | Schedule | None = None, watch: Watch | None = None,
        within: AbstractContextManager[object] | None = None, hands_over: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Sample one seed.

        Args:
            seed: passed to the sampler.
            plan: a plan; or a schedule of the regions of `program`, which keeps its own state, and whose timesteps
                the sampler gets if they were searched. None: compute everything, and count the steps.
            watch: called after each call of the model. If it returns results, the sampler receives them instead.
            within: entered around each call of the model.
            hands_over: of two models, the second one goes on with the state of the first.

        Returns:
            The final samples, float32, on the CPU.

        Raises:
            ScheduleError: the sampler never called the model, or did not return a tensor.
        """
        compile_seconds, begin = self._compile_seconds, self.clock()
        rollout = Rollout(lambda program: self._compiled(program, plan), watch, within, hands_over)
        keywords = {}
        if isinstance(plan, Schedule) and plan.searched_timesteps:
            keywords[TIMESTEPS] = list(plan.timesteps)
        samples = self._call(seed, rollout, keywords)
        if not rollout.schedules:
            raise ScheduleError(
                "calibrate: sample(model, seed) never called the model that it was given (a loop that calls a "
                "pipeline begins with `pipe.transformer = model`), or torch gave up compiling it (its recompile limit: "
                "torch._dynamo.reset() before calibrating helps)"
            )
        seconds = self.clock() - begin
        if self._compile_seconds > compile_seconds:  # replace it by the time of a run without compiling
            seconds = statistics.median(self.uncached) if self.uncached else 0.0
        self.seconds += seconds
        if plan is None:
            if seconds:
                self.uncached.append(seconds)
            self.steps = rollout.steps
        return samples

    def origin(self, seed: int) -> Origin:
        """A sketch of the inputs of the sampler's first call of the model; the run ends there."""
        origins: list[Origin] = []

        def record(entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
            inputs = zip(args, entry.inputs, strict=True)
            origins.append(origin_of(arg for arg, description in inputs if not description.is_weight))
            raise StopRun

        with suppress(StopRun):
            self._call(seed, record)
        return origins[0] if origins else ()

    def warm(self, seed: int, letters: str) -> None:
        """Compile the variants of these row kinds, so that later times include no compiling."""

        def watch(call: Call) -> None:
            if call.program is not self.program or call.state is None:
                return
            compiled, examples = call.compiled, []
            for letter in letters:
                variant = compiled.variants.variant(row_of(self.kinds[letter], order=1))
                arguments = compiled.arguments(variant, call.args, call.state, call.state.last_step + 1)
                examples.append((variant, arguments))
            compiled.variants.compile_together(examples)
            for variant, arguments in examples:
                compiled.variants.compile(variant, arguments)(arguments)
            raise StopRun

        with suppress(StopRun):
            self.run(seed, watch=watch)

    def replay(self, seed: int, interceptor: Interceptor) -> torch.Tensor | None:
        """Run the sampler with `interceptor` in place of the model; None: the interceptor raised `StopRun`."""
        begin = self.clock()
        try:
            return self._call(seed, interceptor)
        except StopRun:
            return None
        finally:
            self.seconds += self.clock() - begin

    def _call(self, seed: int, interceptor: Interceptor, keywords: Mapping[str, Any] | None = None) -> torch.Tensor:
        with ExitStack() as stack:
            stack.enter_context(swapped_in(self.handles, self._argument))
            for handle in self.handles:
                stack.enter_context(intercepting(interceptor, handle_of(handle)))
            stack.enter_context(torch.no_grad())
            model = self.handles[0] if len(self.handles) == 1 else list(self.handles)
            samples = self.sample(model, seed, **(keywords or {}))
        if not isinstance(samples, torch.Tensor):
            raise ScheduleError(
                f"calibrate: sample(model, seed) gave a {type(samples).__name__}, expected a tensor of final samples"
            )
        return samples.detach().float().cpu()

    def _compiled(self, program: Program, plan: Plan | Schedule | None) -> CompiledSchedule:
        """The compiled schedule of a graph. A `Schedule` is for graphs with the regions of `program`: others compute
        everything."""
        if program not in self._programs:
            self._programs.append(program)
        if isinstance(plan, Schedule) and program.regions.keys == self.program.regions.keys:
            return program.compiled(plan)
        if not isinstance(plan, Plan):
            return program.compiled(Schedule.full(), state_schedule=self.caching)
        kinds = self._kinds(program)
        rows = tuple(row_of(kinds.get(letter, kinds[FULL]), order=1) for letter in plan.letters)
        schedule = Schedule(rows, regions=program.regions.keys, order=1)
        order = None if self.caches_branches else PREDICTORS[plan.predictor].order
        return program.compiled(schedule, state_schedule=self.caching, order=order)

    @property
    def _compile_seconds(self) -> float:
        return sum(program.compiler.spent for program in self._programs)


def kinds_of(program: Program) -> Kinds:
    """The row kinds of a program's graph."""
    regions = list(program.regions)
    return row_kinds([region.kind for region in regions], [region.layer for region in regions])
