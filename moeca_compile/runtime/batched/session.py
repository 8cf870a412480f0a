"""Requests that come at any time and are at different steps share the calls of a bundle.

batched = BatchedSession.open("digits.moeca", budget=64 * 2**20)
requests = [batched.submit(sampler(seed)) for seed in range(8)]   # generators: yield inputs, get outputs
batched.run()
images = [request.result() for request in requests]
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeca_compile.errors import MoecaError, OptionError, StateError
from moeca_compile.runtime.batched.budget import lanes_of
from moeca_compile.runtime.batched.calls import Policy, Waiting, cheap_first
from moeca_compile.runtime.batched.invariance import refuse_if_batches_differ
from moeca_compile.runtime.batched.pool import StatePool
from moeca_compile.runtime.batched.requests import PooledTrajectory, Request, Sampler, Step
from moeca_compile.runtime.batched.together import Together
from moeca_compile.runtime.bundle.feeds import Arrays, admit, arrays_of
from moeca_compile.runtime.bundle.manifest import COEFFICIENTS, NOW
from moeca_compile.runtime.output_rows import ComputedRow, ForecastRow
from moeca_compile.runtime.providers.onnxruntime import CPU
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.stats import MAX_RECORDS
from moeca_compile.runtime.trajectory import state_layout


class CallRecord(NamedTuple):
    """One shared call.

    Attributes:
        variant: that ran.
        requests: how many shared it.
        samples: of all of them.
        ms: milliseconds of the variant and of the hoisted values.
    """

    variant: str
    requests: int
    samples: int
    ms: float


class BatchedSession:
    """A session whose requests share calls: those whose next steps run the same variant with the same coefficients.

    State is in slots of a pool that is allocated here. A request that finds no room waits until others end, in the
    order of submission. What a request gets is bit for bit what it gets alone, as far as the runtime's kernels give a
    sample the same bits in every batch: this is tried when the session opens, on the bundle's recorded inputs.

    Any number of threads may use it; one of them runs a call at a time.

    Args:
        session: an opened bundle. Of one with several sizes, the session of one size.
        budget: bytes for the pool, and for the copies that a call makes of it. The runtime's own working memory and the
            weights aren't part of it.
        max_batch: samples of one call, at most.
        exact: False: don't try whether a sample's bits depend on the batch.
        policy: chooses the steps of the next call.
        gather: seconds that a step of a `trajectory` waits for steps of the other open ones, at most.

    Attributes:
        session: what was given.
        pool: the state of all requests.
        max_batch: samples of one call, at most; the pool's size or the bundle's largest batch where that is smaller.
        calls: one record for each call, the last 4096.

    Raises:
        OptionError: a number that can't be.
        StateError: the budget has no room for a single sample.
        BundleError: requests can't share a call of this bundle, or their bits would depend on the batch.
    """

    def __init__(
        self, session: Session, budget: int, max_batch: int = 8, *, exact: bool = True,
        policy: Policy = cheap_first, gather: float = 0.002,
    ) -> None:  # fmt: skip
        self.session, self.calls = session, deque[CallRecord](maxlen=MAX_RECORDS)
        self._policy, self._gather, self._together = policy, gather, Together(session)
        if session.manifest.batch is not None:
            max_batch = min(max_batch, session.manifest.batch[1])
        lanes = lanes_of(session.manifest, budget, max_batch)
        self.pool = StatePool(state_layout(session.manifest, 1), self._together.axes, lanes, session.manifest.regions)
        self.max_batch = min(max_batch, lanes)
        if exact:
            refuse_if_batches_differ(session, self._together, self.max_batch)
        self._changed = threading.Condition()
        self._waiting: list[Step] = []  # for a call, the one that waits for longest first
        self._without_lanes: deque[Step] = deque()
        self._open = weakref.WeakSet[PooledTrajectory]()
        self._is_running = False

    @classmethod
    def open(
        cls, path: str | Path, budget: int, max_batch: int = 8, provider: str = CPU, threads: int | None = None,
        **options: Any,
    ) -> BatchedSession:  # fmt: skip
        """Verify and load a bundle of one size.

        Args:
            path: the directory that `moeca_compile.export` made.
            budget: bytes for the state of all requests, and for the copies that a call makes of it.
            max_batch: samples of one call, at most.
            provider: CPUExecutionProvider or openvino.
            threads: threads of one operator; None: the runtime's choice.
            options: further arguments of the class: `exact`, `policy`, `gather`.

        Returns:
            The session, with every variant loaded and the pool allocated.

        Raises:
            BundleError, OptionError, StateError: as `Session.open` and the class.
        """
        return cls(Session.open(path, provider, threads=threads), budget, max_batch, **options)

    def submit(self, sampler: Sampler, steps: int | None = None, stream: str = "") -> Request:
        """Begin a request. Its sampler runs up to its first step.

        Args:
            sampler: a generator. It yields the inputs of each step, arrays by input name, and is sent the outputs by
                name; what it returns is the request's result. Its batch is that of its first step. An error in its
                step is raised at its `yield`.
            steps: how many steps are expected; one more is refused. None: any number.
            stream: a name for the records.

        Returns:
            The request. It goes on in `step` and `run`.

        Raises:
            OptionError: no generator.
            StateError: the request is larger than the pool or than a call.
            BundleError: inputs that the model doesn't take.
        """
        if not isinstance(sampler, Generator):
            raise OptionError(
                f"sampler: expected a generator, which yields the inputs of each step, got {type(sampler).__name__}"
            )
        request = Request(sampler, self.trajectory(steps, stream))
        try:
            inputs = next(sampler)
        except StopIteration as end:
            request.end(end.value)
            return request
        try:
            self._enqueue(request.trajectory, inputs, request)
        except MoecaError:
            sampler.close()
            request.trajectory.close()
            raise
        return request

    def trajectory(self, steps: int | None = None, stream: str = "") -> PooledTrajectory:
        """Begin a denoising loop for a sampler that calls a model. Each open one needs a thread of its own.

        Args:
            steps: how many calls are expected; one more is refused. None: any number.
            stream: a name for the records.

        Returns:
            A context manager, used as that of `Session.trajectory`. Its `run` waits until the step was part of a call.

        Raises:
            StateError: `steps` isn't a positive number.
        """
        trajectory = PooledTrajectory(self, steps, stream)
        with self._changed:
            self._open.add(trajectory)
        return trajectory

    def step(self) -> int:
        """Run one call.

        Returns:
            How many requests it advanced; 0: none waits.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_running)
            chosen = self._choose()
            self._is_running = bool(chosen)
        if not chosen:
            return 0
        try:
            self._execute(chosen)
        finally:
            with self._changed:
                self._is_running = False
                self._changed.notify_all()
        for step in chosen:
            if step.request is not None:
                self._advance(step.request, step)
        return len(chosen)

    def run(self) -> None:
        """Run calls until every request is done."""
        while self.step():
            pass

    def serve(self, trajectory: PooledTrajectory, inputs: Mapping[str, Any]) -> Arrays:
        """The next step of a trajectory that a thread drives: wait for a call, or run it."""
        step = self._enqueue(trajectory, inputs, None)
        while not step.done:
            if self._is_due(step):
                self.step()
        if step.error is not None:
            raise step.error
        assert step.outputs is not None
        return step.outputs

    def leave(self, trajectory: PooledTrajectory) -> None:
        """A trajectory is closed: its lanes are free, and others may begin."""
        with self._changed:
            self._waiting = [step for step in self._waiting if step.trajectory is not trajectory]
            self._without_lanes = deque(step for step in self._without_lanes if step.trajectory is not trajectory)
            if trajectory.lanes is not None:
                self.pool.give_back(*trajectory.lanes)
                trajectory.lanes = None
            self._open.discard(trajectory)
            self._let_in()
            self._changed.notify_all()

    def _enqueue(self, trajectory: PooledTrajectory, inputs: Mapping[str, Any], request: Request | None) -> Step:
        batch = trajectory.lanes[1] if trajectory.lanes else self._batch_of(inputs)
        step = Step(trajectory, inputs, batch, request)
        with self._changed:
            if trajectory.lanes is None:
                self._without_lanes.append(step)
                self._let_in()
            else:
                self._plan(step)
            self._changed.notify_all()
        if step.error is not None:
            raise step.error
        return step

    def _batch_of(self, inputs: Mapping[str, Any]) -> int:
        manifest = self.session.manifest
        _, batch = admit(manifest, arrays_of(manifest, inputs))
        if batch > self.max_batch:
            raise StateError(
                f"the request has {batch} samples, and a call takes {self.max_batch} (max_batch, and {self.pool.lanes} "
                "lanes in the budget): split the request, or open the session with more"
            )
        return batch

    def _let_in(self) -> None:
        """Give lanes to those who wait for them, in their order."""
        while self._without_lanes:
            step = self._without_lanes[0]
            first = self.pool.take(step.batch)
            if first is None:
                return
            self._without_lanes.popleft()
            step.trajectory.lanes = first, step.batch
            self._plan(step)

    def _plan(self, step: Step) -> None:
        try:
            step.planned = step.trajectory.plan(step.inputs)
        except MoecaError as error:
            step.error = error
        else:
            self._waiting.append(step)

    def _choose(self) -> list[Step]:
        """Take the steps of the next call out of those that wait."""
        if not self._waiting:
            return []
        waiting = [
            Waiting(self._key(step), step.planned.variant.spec.macs, step.batch, step.passed)
            for step in self._waiting
            if step.planned is not None
        ]
        numbers = set(self._policy(waiting, self.max_batch))
        chosen = [step for number, step in enumerate(self._waiting) if number in numbers]
        self._waiting = [step for number, step in enumerate(self._waiting) if number not in numbers]
        for step in self._waiting:
            step.passed += 1
        return chosen

    def _key(self, step: Step) -> Hashable:
        """Steps with equal keys can share a call: same variant, and equal values of what holds for a whole call."""
        assert step.planned is not None
        variant, feeds = step.planned.variant, step.planned.feeds
        if isinstance(variant, ForecastRow):
            return id(variant)  # each runs by itself
        common = (*self._together.shared, *(name for name in (COEFFICIENTS, NOW) if name in feeds))
        return id(variant), *(np.asarray(feeds[name]).tobytes() for name in common)

    def _execute(self, steps: list[Step]) -> None:
        plans = [step.planned for step in steps if step.planned is not None]
        begin = time.perf_counter()
        try:
            results = self._values(steps)
        except MoecaError as error:
            for step in steps:
                step.error = error
            return
        ms = (time.perf_counter() - begin) * 1e3
        for step, planned, values in zip(steps, plans, results, strict=True):
            try:
                step.outputs = step.trajectory.commit(planned, values, ms)
            except MoecaError as error:
                step.error = error
        self.calls.append(CallRecord(plans[0].variant.spec.name, len(steps), sum(step.batch for step in steps), ms))

    def _values(self, steps: list[Step]) -> list[list[Any]]:
        """What the steps' variant gives each of them."""
        plans = [step.planned for step in steps if step.planned is not None]
        batches, variant = [step.batch for step in steps], plans[0].variant
        if isinstance(variant, ForecastRow):
            return [variant.run(planned.feeds) for planned in plans]
        hoisted = [step.trajectory.hoisted for step in steps]
        for spec, loaded in hoisted[0].needed(variant.spec.hoists):
            stale = [n for n, values in enumerate(hoisted) if values.is_stale(spec, plans[n].feeds)]
            if stale:
                feeds = [hoisted[n].feeds(spec, plans[n].feeds) for n in stale]
                for n, results in zip(
                    stale, self._together.run(loaded, feeds, [batches[n] for n in stale]), strict=True
                ):
                    hoisted[n].put(spec, plans[n].feeds, results)
        feeds = [
            planned.feeds | values.of(variant.spec.hoists, planned.feeds)
            for planned, values in zip(plans, hoisted, strict=True)
        ]
        if isinstance(variant, ComputedRow):
            values = self._together.run(variant.network, feeds, batches)
            return [variant.after(planned.feeds, v) for planned, v in zip(plans, values, strict=True)]
        return self._together.run(variant, feeds, batches)

    def _advance(self, request: Request, step: Step) -> None:
        """Let a request's sampler go on, up to its next step or its end."""
        error = step.error
        while True:
            try:
                if error is not None:
                    inputs = request.sampler.throw(error)
                else:
                    assert step.outputs is not None
                    inputs = request.sampler.send(step.outputs)
            except StopIteration as end:
                request.end(end.value)
                return
            except Exception as raised:
                request.end(error=raised)
                return
            try:
                self._enqueue(request.trajectory, inputs, request)
                return
            except MoecaError as refused:
                error = refused

    def _is_due(self, step: Step) -> bool:
        """Wait until a step is done (False), or a call is due and nobody runs one (True)."""
        with self._changed:
            while not step.done:
                if not self._is_running and self._is_gathered():
                    return True
                gathers = self._waiting and not self._is_running
                self._changed.wait(self._gather if gathers else None)
        return False

    def _is_gathered(self) -> bool:
        """Whether a call is due: everybody who may come waits for it, or somebody has waited long enough."""
        if not self._waiting:
            return False
        waited = time.monotonic() - self._waiting[0].since
        return len(self._waiting) + len(self._without_lanes) >= len(self._open) or waited >= self._gather
