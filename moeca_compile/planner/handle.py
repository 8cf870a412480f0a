"""A model with its sampler, run with any plan; each run is a trajectory of its own.

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
from moeca_compile.engine.blocks import current
from moeca_compile.engine.handle_runtime import HandleRuntime
from moeca_compile.engine.program import Program
from moeca_compile.engine.step import arguments_for, run_step
from moeca_compile.engine.tracks import Track, Tracks
from moeca_compile.engine.trajectory import Trajectory
from moeca_compile.engine.visit import visiting
from moeca_compile.errors import ScheduleError
from moeca_compile.frontend.backend import Entry
from moeca_compile.frontend.doors import one_model, plain_module, standing_in
from moeca_compile.frontend.owner import handle_of
from moeca_compile.planner.origin import Origin, origin_of
from moeca_compile.planner.search.predict import PREDICTORS, Predictor
from moeca_compile.planner.search.rows import FULL, Kinds, Plan, filled, row_kinds, row_of
from moeca_compile.runtime.state import Coefficients, StreamState
from moeca_compile.runtime.stats import StepRecord
from moeca_compile.schedule import Schedule

Sampler = Callable[[Any, int], torch.Tensor]


@dataclass(frozen=True)
class Call:
    """One call of the model in a run, just done: what it got, what came out, and where it stands."""

    program: Program
    track: Track
    stream: str
    record: StepRecord
    args: Sequence[Any]
    results: Sequence[Any]

    @property
    def state(self) -> StreamState | None:
        """None: the call couldn't be placed, and was computed in full."""
        found = (state for name, state in self.track.states.items() if str(name) == self.record.stream)
        return next(found, None)

    @property
    def latent(self) -> torch.Tensor | None:
        return None if self.program.latent is None else self.args[self.program.latent]

    @property
    def timestep(self) -> float | None:
        if self.program.timestep is None:
            return None
        return float(torch.as_tensor(self.args[self.program.timestep]).reshape(-1)[0])


Watch = Callable[[Call], tuple[Any, ...] | None]


class _Seen(BaseException):
    """Ends a sampler that has shown what it starts from; no sampler catches it."""


class _Predicting(StreamState):
    """A stream's state that forecasts with a predictor of the plan's instead of the schedule's order."""

    __slots__ = ("predictor",)
    predictor: Predictor

    @classmethod
    def of(cls, state: StreamState, predictor: Predictor) -> _Predicting:
        one = cls(state.layout, state.regions)
        one.tensors, one.history, one.last_step = state.tensors, state.history, state.last_step
        one.predictor = predictor
        return one

    def coefficients(self, step: int) -> Coefficients:
        keeps = self.predictor.keeps
        return tuple(self.predictor.coefficients(step, seen[:keeps]) for seen in self.history)


class Enough(BaseException):
    """Ends a run early; not an Exception, so that a sampler's own handlers let it through."""


class Handle:
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
        self._given, plain = model, plain_module(one_model(model, "calibrate"))
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
        return filled(plain, self.caching.rows[-1]) if self.by_branches else plain

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
        open_: dict[Any, Tracks] = {}
        bound: set[Program] = set()
        spent = self._compiling

        def visit(entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
            program, args = entry.place(args, runtime)
            if program not in bound:
                bound.add(program)
                self._bind(program, plan)
            trajectory = current(runtime.ids)
            if trajectory not in open_:
                open_[trajectory] = Tracks(trajectory or Trajectory(()))
            tracks = open_[trajectory]
            with within or nullcontext():
                results = run_step(program, tracks, args, trajectory)
            track = tracks.of(program)
            if isinstance(plan, Plan) and not self.by_branches:
                for name, state in track.states.items():
                    if not isinstance(state, _Predicting):  # the first step, which forecasts nothing
                        track.states[name] = _Predicting.of(state, PREDICTORS[plan.predictor])
            if watch is not None:
                record = tracks.records[-1]
                stream = f"{trajectory.stream if trajectory is not None else None}/{record.stream}"
                altered = watch(Call(program, track, stream, record, args, results))
                return results if altered is None else altered
            return results

        begin = self.clock()
        try:
            samples = self._call(seed, visit)
        finally:
            for program in bound:  # the sampler may be called by others who hold the model
                program.use(self.caching)
        if not bound:
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
            self.steps = max((1 + record.step for tracks in open_.values() for record in tracks.records), default=0)
        return samples

    def origin(self, seed: int) -> Origin:
        """What the sampler starts from with a seed; it is ended at its first call of the model."""
        found: list[Origin] = []

        def visit(entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
            found.append(origin_of(arg for arg, one in zip(args, entry.inputs, strict=True) if not one.is_weight))
            raise _Seen

        with suppress(_Seen):
            self._call(seed, visit)
        return found[0] if found else ()

    def warm(self, seed: int, letters: str) -> None:
        """Compile what plans of these letters run, so that no compiling is in the times of what follows."""

        def watch(call: Call) -> None:
            if call.program is not self.program or call.state is None:
                return
            wanted, step = [], call.state.last_step + 1
            for letter in letters:
                variant = self.program.variant(row_of(self.kinds[letter], order=1))
                wanted.append((variant, arguments_for(self.program, call.track, variant, call.args, call.state, step)))
            self.program.compile_together(wanted)
            for variant, arguments in wanted:
                self.program.compile(variant, arguments)(arguments)
            raise Enough

        with suppress(Enough):
            self.run(seed, watch=watch)

    def replay(
        self, seed: int, visit: Callable[[Entry, Sequence[Any], HandleRuntime], tuple[Any, ...]]
    ) -> torch.Tensor | None:
        """Run the sampler with `visit` in the model's place; None where that raised `Enough`."""
        begin = self.clock()
        try:
            return self._call(seed, visit)
        except Enough:
            return None
        finally:
            self.seconds += self.clock() - begin

    def _call(self, seed: int, visit: Callable[[Entry, Sequence[Any], HandleRuntime], tuple[Any, ...]]) -> torch.Tensor:
        with standing_in(self.model, self._given), visiting(visit, handle_of(self.model)), torch.no_grad():
            samples = self.sample(self.model, seed)
        if not isinstance(samples, torch.Tensor):
            raise ScheduleError(
                f"calibrate: sample(model, seed) gave a {type(samples).__name__}, expected a tensor of final samples"
            )
        return samples.detach().float().cpu()

    def _bind(self, program: Program, plan: Plan | Schedule | None) -> None:
        if program not in self._programs:
            self._programs.append(program)
        if isinstance(plan, Schedule) and program is self.program:
            program.use(plan)
            return
        if not isinstance(plan, Plan):
            schedule = Schedule.full()
        else:
            kinds = self._kinds(program)
            rows = tuple(row_of(kinds.get(letter, kinds[FULL]), order=1) for letter in plan.letters)
            schedule = Schedule(rows, regions=program.regions.keys, order=1)
        program.use(schedule, keep=self.caching)

    @property
    def _compiling(self) -> float:
        return sum(sum(program.compile_seconds.values()) for program in self._programs)


def kinds_of(program: Program) -> Kinds:
    """The row kinds of a program's graph."""
    regions: Mapping[str, Any] = {region.key: region for region in program.regions}
    return row_kinds([one.kind for one in regions.values()], [one.layer for one in regions.values()])
