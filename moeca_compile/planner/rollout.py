"""Rollouts: a model run by its sampler, each time with another schedule; each run is a trajectory of its own.

The user's loop stays the user's: only what a call of the compiled model does is replaced while it runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
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
from moeca_compile.frontend.model_arguments import plain_module, single_model, swapped_in
from moeca_compile.frontend.owner import handle_of
from moeca_compile.planner.origin import Origin, origin_of
from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.planner.search.rows import FULL, Kinds, Plan, row_kinds, row_of, with_partial
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.stats import StepRecord
from moeca_compile.schedule import Schedule

Sampler = Callable[[Any, int], torch.Tensor]


@dataclass(frozen=True)
class Call:
    """One call of the model in a rollout, just done: what it got, what came out, and where it stands.

    Attributes:
        compiled: the schedule that ran.
        stream: of the trajectory that the sampler opened, if any, and of the call in it.
        state: None: the call couldn't be placed, and was computed in full.
    """

    compiled: CompiledSchedule
    stream: str
    record: StepRecord
    state: StreamState | None
    args: Sequence[Any]
    results: Sequence[Any]

    @property
    def program(self) -> Program:
        return self.compiled.program

    @property
    def latent(self) -> torch.Tensor | None:
        return None if self.program.latent is None else self.args[self.program.latent]

    @property
    def timestep(self) -> float | None:
        if self.program.timestep is None:
            return None
        return float(torch.as_tensor(self.args[self.program.timestep]).reshape(-1)[0])


Watch = Callable[[Call], tuple[Any, ...] | None]


class Rollout:
    """One run of a sampler: in place of the handle's schedule, each graph runs the one that `compile_for` gives.

    Args:
        watch: sees every call; what it returns, if anything, is handed to the sampler in place of the call's results.
        within: entered around each call.

    Attributes:
        schedules: of the graphs that ran.
        running: the state of each trajectory; None: of calls outside any that the sampler opened.
    """

    def __init__(
        self, compile_for: Callable[[Program], CompiledSchedule], watch: Watch | None = None,
        within: AbstractContextManager[object] | None = None,
    ) -> None:  # fmt: skip
        self._compile_for, self._watch, self._within = compile_for, watch, within or nullcontext()
        self.schedules: dict[Program, CompiledSchedule] = {}
        self.running: dict[Trajectory | None, TrajectoryState] = {}

    def __call__(self, entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
        program, args = entry.place(args, runtime)
        if program not in self.schedules:
            self.schedules[program] = self._compile_for(program)
        compiled, trajectory = self.schedules[program], current(runtime.ids)
        if trajectory not in self.running:
            self.running[trajectory] = TrajectoryState(trajectory or Trajectory(()))
        running = self.running[trajectory]
        with self._within:
            results = run_step(compiled, running, args, trajectory)
        if self._watch is None:
            return results
        record = running.records[-1]
        streams = running.of(compiled).streams.items()
        state = next((stream.state for name, stream in streams if str(name) == record.stream), None)
        name = f"{trajectory.stream if trajectory is not None else None}/{record.stream}"
        altered = self._watch(Call(compiled, name, record, state, args, results))
        return results if altered is None else altered

    @property
    def steps(self) -> int:
        """Of the longest trajectory."""
        return max((1 + record.step for one in self.running.values() for record in one.records), default=0)


class _Seen(BaseException):
    """Ends a sampler that has shown what it starts from; no sampler catches it."""


class Enough(BaseException):
    """Ends a run early; not an Exception, so that a sampler's own handlers let it through."""


class SampledModel:
    """One compiled model and its sampler.

    Args:
        caching: whose state is kept whatever plan runs. None: whole regions, one layout for all orders. One that names
            its regions and has a PARTIAL row last: what a region that isn't computed does in that row it does in every
            plan, and all forecasts are of its order.

    Attributes:
        steps: of a trajectory, once it has run.
        seconds: of the runs so far, compiling left out; of the processor where that runs the model, so that others who
            use the machine don't count.
        uncached: of each of the uncached ones.
    """

    def __init__(
        self, model: Any, sample: Sampler, granularity: str, inner: str, caching: Schedule | None = None
    ) -> None:
        self.sample, self.granularity = sample, granularity
        self.caching = caching or Schedule.uniform(2, order=2)
        self._given, plain = model, plain_module(single_model(model, "calibrate"))
        in_place = getattr(plain, "_compiled_call_impl", None)
        self.model = moeca_compile_model(plain, schedule=self.caching, inner=inner, granularity=granularity)
        if in_place is not None:  # of the caller's
            plain._compiled_call_impl = in_place
        self._programs: list[Program] = []
        self.steps = 0
        self.seconds = 0.0
        self.uncached: list[float] = []
        on_cpu = all(weight.device.type == "cpu" for weight in plain.parameters())
        self.clock = time.process_time if on_cpu else time.perf_counter

    @property
    def program(self) -> Program:
        """The graph with the most regions; all of them run the plan. There is one after the first run."""
        return max(self._programs, key=lambda program: len(program.regions))

    @property
    def kinds(self) -> Kinds:
        return self._kinds(self.program)

    @property
    def by_branches(self) -> bool:
        return self.caching.regions is not None

    def _kinds(self, program: Program) -> Kinds:
        plain = kinds_of(program)
        return with_partial(plain, self.caching.rows[-1]) if self.by_branches else plain

    def run(
        self, seed: int, plan: Plan | Schedule | None = None, watch: Watch | None = None,
        within: AbstractContextManager[object] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The samples of one seed with a plan; None computes everything, and counts the steps. A schedule, of the
        regions of `program`, keeps its own state.

        watch: sees every call; what it returns, if anything, is handed to the sampler in place of the call's results.
        within: entered around each call of the program.

        Raises:
            ScheduleError: the sampler never called the model, or gave no tensor.
        """
        spent, begin = self._compiling, self.clock()
        rollout = Rollout(lambda program: self._compiled(program, plan), watch, within)
        samples = self._call(seed, rollout)
        if not rollout.schedules:
            raise ScheduleError(
                "calibrate: sample(model, seed) never called the model that it was given (a loop that calls a "
                "pipeline begins with `pipe.transformer = model`), or torch gave up compiling it (its recompile limit: "
                "torch._dynamo.reset() before calibrating helps)"
            )
        seconds = self.clock() - begin
        if self._compiling > spent:  # as much as a run that didn't
            seconds = statistics.median(self.uncached) if self.uncached else 0.0
        self.seconds += seconds
        if plan is None:
            if seconds:
                self.uncached.append(seconds)
            self.steps = rollout.steps
        return samples

    def origin(self, seed: int) -> Origin:
        """What the sampler starts from with a seed; it is ended at its first call of the model."""
        found: list[Origin] = []

        def look(entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
            found.append(origin_of(arg for arg, one in zip(args, entry.inputs, strict=True) if not one.is_weight))
            raise _Seen

        with suppress(_Seen):
            self._call(seed, look)
        return found[0] if found else ()

    def warm(self, seed: int, letters: str) -> None:
        """Compile what plans of these letters run, so that no compiling is in the times of what follows."""

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
            raise Enough

        with suppress(Enough):
            self.run(seed, watch=watch)

    def replay(self, seed: int, interceptor: Interceptor) -> torch.Tensor | None:
        """Run the sampler with `interceptor` in the model's place; None where that raised `Enough`."""
        begin = self.clock()
        try:
            return self._call(seed, interceptor)
        except Enough:
            return None
        finally:
            self.seconds += self.clock() - begin

    def _call(self, seed: int, interceptor: Interceptor) -> torch.Tensor:
        with (
            swapped_in(self.model, self._given),
            intercepting(interceptor, handle_of(self.model)),
            torch.no_grad(),
        ):
            samples = self.sample(self.model, seed)
        if not isinstance(samples, torch.Tensor):
            raise ScheduleError(
                f"calibrate: sample(model, seed) gave a {type(samples).__name__}, expected a tensor of final samples"
            )
        return samples.detach().float().cpu()

    def _compiled(self, program: Program, plan: Plan | Schedule | None) -> CompiledSchedule:
        """What a graph runs under a plan: graphs that a plan or schedule isn't for are computed in full."""
        if program not in self._programs:
            self._programs.append(program)
        if isinstance(plan, Schedule) and program is self.program:
            return program.compiled(plan)
        if not isinstance(plan, Plan):
            return program.compiled(Schedule.full(), state_schedule=self.caching)
        kinds = self._kinds(program)
        rows = tuple(row_of(kinds.get(letter, kinds[FULL]), order=1) for letter in plan.letters)
        schedule = Schedule(rows, regions=program.regions.keys, order=1)
        order = None if self.by_branches else PREDICTORS[plan.predictor].order
        return program.compiled(schedule, state_schedule=self.caching, order=order)

    @property
    def _compiling(self) -> float:
        return sum(program.compiler.spent for program in self._programs)


def kinds_of(program: Program) -> Kinds:
    """The row kinds of a program's graph."""
    regions: Mapping[str, Any] = {region.key: region for region in program.regions}
    return row_kinds([one.kind for one in regions.values()], [one.layer for one in regions.values()])
