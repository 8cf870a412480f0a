"""Requests that come at any time and are at different steps share the calls of a compiled model.

model = moeca_compile.compile(model, schedule="uniform:3")
batched = moeca_compile.BatchedModel(model, (x, t, y), budget=64 * 2**20)
requests = [batched.submit(sampler(seed)) for seed in range(8)]   # generators: yield inputs, get outputs
batched.run()
images = [request.result() for request in requests]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from moeca_compile.engine.batched.call import PlannedCall, run_together
from moeca_compile.engine.batched.forms import Forms, needs_of, program_of, zeros
from moeca_compile.engine.batched.loop import Generations, PooledLoop, Values
from moeca_compile.engine.batched.samples import samples_of
from moeca_compile.engine.batched.trial import Found, are_equal, run_rows
from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.engine.handle_runtime import HandleRuntime
from moeca_compile.engine.intercept import intercepting
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.errors import OptionError, StateError
from moeca_compile.frontend.arguments import Arguments
from moeca_compile.frontend.batched.inputs import Inputs, Results
from moeca_compile.frontend.entry import Entry
from moeca_compile.frontend.model_arguments import compiled_parts, single_model
from moeca_compile.frontend.owner import handle_of
from moeca_compile.graph.content import Contents
from moeca_compile.ops.even_rows import even_rows
from moeca_compile.options import Options
from moeca_compile.runtime.batched.budget import lanes_in
from moeca_compile.runtime.batched.calls import Policy, cheap_first
from moeca_compile.runtime.batched.pool import StatePool
from moeca_compile.runtime.batched.requests import Step
from moeca_compile.runtime.batched.scheduler import Scheduler
from moeca_compile.schedule.granularity import OUTPUT

Run = Callable[[CompiledSchedule, Sequence[Any]], tuple[Any, ...]]  # of a graph's schedule and arguments: its outputs


class _Forgotten(Exception):
    """All state was dropped since the steps of a call were planned."""


class BatchedModel(Scheduler):
    """A compiled model whose requests share calls: those whose next steps run the same variant with the same
    coefficients. The twin of `moeca_compile.runtime.BatchedSession` for torch, with the same methods.

    State is in slots of a pool that is allocated here. A request that finds no room waits until others end, in the
    order of submission. Calls have a few batches only (`batches`); a call of fewer samples is filled up with copies.

    torch's kernels may give a sample other bits in another batch. So each variant is tried when this opens, on made-up
    state: batches in which a sample gets other bits than in the largest one are left out. What a request gets is then
    bit for bit what it gets without other requests.

    Any number of threads may use it; one of them runs a call at a time.

    Args:
        model: compiled, or a pipeline with one compiled transformer.
        inputs: example arguments of one call: a tuple, or a mapping of keywords. A tensor whose first size is the
            example's batch has samples; all others, and numbers, hold for a whole call.
        budget: bytes for the pool, for hoisted values, and for the copies that a call makes of them. The model's
            weights and its own working memory aren't part of it.
        max_batch: samples of one call, at most.
        exact: False: don't try whether a sample's bits depend on the batch.
        policy: chooses the steps of the next call.
        gather: seconds that a step of a `trajectory` waits for steps of the other open ones, at most.

    Attributes:
        pool: the state of all requests.
        max_batch: samples of one call, at most; the pool's size where that is smaller.
        batches: of the calls.
        calls: one record for each call, the last 4096.

    Raises:
        OptionError: a number that can't be.
        StateError: the model isn't compiled or can't be cached, its options or its graph don't allow shared calls (nor
            does a graph that exchanges tensors with other ranks), a sample's bits depend on the others in its call,
            or the budget has no room for a single sample.
        LoweringError: the example has no tensor with a batch.
    """

    def __init__(
        self, model: Any, inputs: Arguments, budget: int, max_batch: int = 8, *, exact: bool = True,
        policy: Policy = cheap_first, gather: float = 0.002,
    ) -> None:  # fmt: skip
        self._model = single_model(model, "BatchedModel")
        compiled_parts(self._model, "BatchedModel")
        self._inputs, self._numbers = Inputs(inputs), itertools.count()
        self._results: dict[int, Any] = {}
        self._outputs: dict[int, list[Sequence[int]]] = {}  # by batch, shapes of the graph's outputs
        self._shared, self._exact = Contents(), exact
        self.timestep: int | None = None
        self.condition: tuple[int, ...] = ()
        home = self._compiled(1)
        lanes = lanes_in(budget, needs_of(home, self._inputs.bytes), max_batch)
        max_batch = min(max_batch, lanes)
        sizes = sorted({*(2**n for n in range(max_batch.bit_length())), max_batch})
        if len(sizes) > (most := self._runtime.options.max_signatures):
            raise OptionError(
                f"max_batch={max_batch}: calls have batches of {sizes}, and the model keeps programs for {most} sizes: "
                "compile it with a larger max_signatures, or give a smaller max_batch"
            )
        self.forms = Forms({batch: home if batch == 1 else self._compiled(batch) for batch in sizes})
        self._split = Results(self._results)
        self._results = {}
        pool = StatePool(home.layout, [s.axis or 0 for s in self.forms.slots], lanes, len(home.driver.full), zeros)
        super().__init__(pool, max_batch, policy, gather)
        self.batches = tuple(self._equal_batches(sizes) if exact else sizes)
        self.running = Generations(Trajectory(()))
        group = self._runtime.trajectories
        group.alive.add(self.running)
        group.history.add(self.running.records, True)

    def admit(self, inputs: Any) -> tuple[list[Any], int]:
        """The leaves of a step's inputs, and its number of samples.

        Raises:
            StateError: the model doesn't take them.
        """
        return self._inputs.admit(inputs)

    def _new_trajectory(self, steps: int | None, stream: str) -> PooledLoop:
        return PooledLoop(self, next(self._numbers), steps, stream)

    def _batch_of(self, inputs: Any) -> int:
        return self.admit(inputs)[1]

    def _key(self, step: Step) -> Hashable:
        """Steps with equal keys can share a call: same row, and equal values of what holds for a whole call."""
        planned: PlannedCall = step.planned
        variant, driver = planned.variant, self.forms.home.driver
        key: list[Hashable] = [planned.row]
        if variant.wants_now:
            key.append(planned.step)
        if variant.wants_coefficients:
            key.append(driver.coefficients(planned.stream.state, planned.step))
        for i in self._inputs.shared:
            value = planned.leaves[i]
            if isinstance(value, torch.Tensor):
                key.append(self._shared.number(value))
        return tuple(key)

    def _values(self, steps: list[Step]) -> list[Values]:
        while True:
            try:
                return self._call([step.planned for step in steps])
            except _Forgotten:  # weights changed: every request is cold now
                with self._changed:
                    for step in (*steps, *self._waiting):
                        step.planned = step.trajectory.plan(step.inputs)

    def _call(self, plans: Sequence[PlannedCall]) -> list[Values]:
        batches = [planned.batch for planned in plans]
        batch = next(size for size in self.batches if size >= sum(batches))
        padding = batch - sum(batches)
        written: list[list[torch.Tensor]] = []

        def run(compiled: CompiledSchedule, args: Sequence[Any]) -> tuple[Any, ...]:
            if compiled is not self.forms.compiled[batch]:
                raise StateError(
                    "this call runs another graph than when the batched model was opened: autocast, modes and "
                    "attributes of the model must be as they were then. Open another batched model"
                )
            if any(planned.generation != self.running.generation for planned in plans):
                raise _Forgotten
            with self._runtime.trajectories.lock:
                self._runtime.trajectories.latest = self.running  # what `stats` tells
            outputs, parts = run_together(self.forms, compiled, args, plans, padding)
            written[:] = parts
            return outputs

        result = self._run(self._inputs.joined([planned.leaves for planned in plans], padding), run)
        return list(zip(written, self._split.split(result, batches), strict=True))

    def _run(self, arguments: tuple[tuple[Any, ...], dict[str, Any]], run: Run) -> Any:
        """Call the model, with its graph run by `run`.

        Raises:
            StateError: the model runs as several graphs, or none.
        """
        ran = 0

        def intercepted(entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
            nonlocal ran
            ran += 1
            self._runtime = runtime
            _refuse(runtime.options)
            program, args = entry.place(args, runtime)
            if program.agreement is not None:
                raise StateError(
                    "BatchedModel: the model's graph exchanges tensors with other ranks. Each would choose its own "
                    "calls, and one would wait for an exchange that another never makes: call the model itself, one "
                    "trajectory for each request, in the same order on all ranks"
                )
            packed = runtime.packs.active() if program.packs_experts else nullcontext()
            with packed, even_rows() if self._exact else nullcontext():
                return run(program.compiled_schedule, args)

        with torch.inference_mode(False), torch.no_grad(), intercepting(intercepted, handle_of(self._model)):
            result = self._model(*arguments[0], **arguments[1])
            if not ran:  # a first call may only prepare the model
                result = self._model(*arguments[0], **arguments[1])
        if ran != 1:
            raise StateError(
                f"the model ran {ran} graphs in one call, and requests share the call of one: "
                "moeca_compile.explain(model, ...) names the breaks"
            )
        return result

    def _compiled(self, batch: int) -> CompiledSchedule:
        """Compile the schedule for calls of a batch."""
        found: list[CompiledSchedule] = []
        leaves = self._inputs.varied(batch)

        def warm(compiled: CompiledSchedule, args: Sequence[Any]) -> tuple[Any, ...]:
            found.append(compiled)
            prologues, place = program_of(compiled).prologues, {id(leaf): i for i, leaf in enumerate(leaves)}
            self.condition = tuple(place[id(args[i])] for i in prologues.condition if id(args[i]) in place)
            self.timestep = None if not prologues.timesteps else place.get(id(args[prologues.timesteps[0]]))
            outputs = compiled.warm(args)
            self._outputs[batch] = [getattr(output, "shape", ()) for output in outputs]
            return outputs

        self._results[batch] = self._run(self._inputs.arguments(leaves), warm)
        return found[-1]

    def _equal_batches(self, sizes: Sequence[int]) -> list[int]:
        """The batches in which a sample gets the bits of the largest one.

        Raises:
            StateError: its bits depend on the others in the call.
        """
        most = sizes[-1]
        outputs = [
            samples_of({size: shapes[i] for size, shapes in self._outputs.items()}, f"output {i}")
            for i in range(len(self._outputs[1]))
        ]
        varied = self._inputs.varied(most)

        def tried(numbers: Sequence[int]) -> Found:
            found: Found = []

            def run(compiled: CompiledSchedule, args: Sequence[Any]) -> tuple[Any, ...]:
                results, parts = run_rows(self.forms, compiled, args, numbers, outputs)
                found[:] = parts
                return results

            self._run(self._inputs.joined([self._inputs.sample(varied, n) for n in numbers], 0), run)
            return found

        expected = tried(range(most))
        alone = [tried([number] * most)[0] for number in (0, most - 1)]
        found = [*tried(range(most)[::-1])[::-1], *alone]
        if not all(map(are_equal, [*expected, expected[0], expected[-1]], found)):
            raise StateError(
                "the model gives a sample other bits beside other samples: its samples touch each other (experts with "
                "a capacity, statistics over the batch), or its kernels round so. exact=False accepts that"
            )
        return [batch for batch in sizes if batch == most or all(map(are_equal, expected, tried(range(batch))))]


def _refuse(options: Options) -> None:
    """Raises:
    StateError: calls of a model with these options can't be shared.
    """
    names = {
        "granularity='output'": options.granularity == OUTPUT,
        "cuda_graphs=True": options.cuda_graphs,
        "free_hoisted": bool(options.free_hoisted),
    }
    if taken := [name for name, is_set in names.items() if is_set]:
        raise StateError(
            f"BatchedModel: {', '.join(taken)} keeps requests from sharing calls: compile the model without it"
        )
