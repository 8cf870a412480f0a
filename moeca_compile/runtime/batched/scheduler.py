"""Requests at different steps that share calls: who waits, who may begin, which steps make the next call.

Nothing here knows what runs a call: a bundle (`session.py`) or a compiled model (`engine/batched`).
"""

from __future__ import annotations

import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Hashable, Sequence
from typing import Any, NamedTuple

from moeca_compile.errors import MoecaError, OptionError, StateError
from moeca_compile.runtime.batched.calls import Policy, Waiting
from moeca_compile.runtime.batched.pool import StatePool
from moeca_compile.runtime.batched.requests import Loop, Request, Sampler, Step
from moeca_compile.runtime.stats import MAX_RECORDS


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


class Scheduler(ABC):
    """Runs the requests of a pool. Any number of threads may use it; one of them runs a call at a time.

    Args:
        pool: the state of all requests.
        max_batch: samples of one call, at most.
        policy: chooses the steps of the next call.
        gather: seconds that a step of a `trajectory` waits for steps of the other open ones, at most.

    Attributes:
        pool, max_batch: as given.
        calls: one record for each call, the last 4096.
    """

    def __init__(self, pool: StatePool, max_batch: int, policy: Policy, gather: float) -> None:
        self.pool, self.max_batch, self.calls = pool, max_batch, deque[CallRecord](maxlen=MAX_RECORDS)
        self._policy, self._gather = policy, gather
        self._changed = threading.Condition()
        self._waiting: list[Step] = []  # for a call, the one that waits for longest first
        self._without_lanes: deque[Step] = deque()
        self._open = weakref.WeakSet[Loop]()
        self._is_running = False

    def submit(self, sampler: Sampler, steps: int | None = None, stream: str = "") -> Request:
        """Begin a request. Its sampler runs up to its first step.

        Args:
            sampler: a generator. It yields the inputs of each step and is sent the outputs, as a `trajectory`'s `run`
                takes and gives them; what it returns is the request's result. Its batch is that of its first step. An
                error in its step is raised at its `yield`.
            steps: how many steps are expected; one more is refused. None: any number.
            stream: a name for the records.

        Returns:
            The request. It goes on in `step` and `run`.

        Raises:
            OptionError: no generator.
            StateError: the request is larger than the pool or than a call.
            BundleError, StateError: inputs that the model doesn't take.
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

    def trajectory(self, steps: int | None = None, stream: str = "") -> Any:
        """Begin a denoising loop for a sampler that calls a model. Each open one needs a thread of its own.

        Args:
            steps: how many calls are expected; one more is refused. None: any number.
            stream: a name for the records.

        Returns:
            A context manager. Its `run` takes the inputs of the next step, waits until the step was part of a call, and
            returns the outputs.

        Raises:
            StateError: `steps` isn't a positive number.
        """
        trajectory = self._new_trajectory(steps, stream)
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

    def advance(self, steps: Sequence[tuple[Any, Any]]) -> list[Any]:
        """Run the next step of several trajectories, in as few calls as they fit, for a server that has their requests
        at hand.

        Args:
            steps: trajectories of this session, each with the inputs of its next step.

        Returns:
            For each its outputs, or the error that kept the step from running.
        """
        asked: list[Step | MoecaError] = []
        for trajectory, inputs in steps:
            try:
                asked.append(self._enqueue(trajectory, inputs, None))
            except MoecaError as error:
                asked.append(error)
        while any(isinstance(step, Step) and not step.done for step in asked) and self.step():
            pass
        with self._changed:
            for step in asked:
                if isinstance(step, Step) and not step.done:
                    self._without_lanes.remove(step)
                    step.error = StateError(
                        f"{self.pool.free} of the pool's {self.pool.lanes} lanes are free, and the trajectory has "
                        f"{step.batch} samples: end others first, or give a larger budget"
                    )
        return [step if isinstance(step, MoecaError) else step.error or step.outputs for step in asked]

    def serve(self, trajectory: Loop, inputs: Any) -> Any:
        """The next step of a trajectory that a thread drives: wait for a call, or run it."""
        step = self._enqueue(trajectory, inputs, None)
        while not step.done:
            if self._is_due(step):
                self.step()
        if step.error is not None:
            raise step.error
        assert step.outputs is not None
        return step.outputs

    def leave(self, trajectory: Loop) -> None:
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

    @abstractmethod
    def _new_trajectory(self, steps: int | None, stream: str) -> Loop:
        """A denoising loop without lanes."""

    @abstractmethod
    def _batch_of(self, inputs: Any) -> int:
        """The number of samples of a request whose first step has these inputs.

        Raises:
            MoecaError: the model doesn't take them.
        """

    @abstractmethod
    def _key(self, step: Step) -> Hashable:
        """Steps with equal keys can share a call."""

    @abstractmethod
    def _values(self, steps: list[Step]) -> Sequence[Any]:
        """Run a call for steps of one key: for each what its trajectory's `commit` takes."""

    def _enqueue(self, trajectory: Loop, inputs: Any, request: Request | None) -> Step:
        batch = trajectory.lanes[1] if trajectory.lanes else self._batch_of(inputs)
        if batch > self.max_batch:
            raise StateError(
                f"the request has {batch} samples, and a call takes {self.max_batch} (max_batch, and {self.pool.lanes} "
                "lanes in the budget): split the request, or open the session with more"
            )
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
        waiting = [Waiting(self._key(step), step.planned.macs, step.batch, step.passed) for step in self._waiting]
        numbers = set(self._policy(waiting, self.max_batch))
        chosen = [step for number, step in enumerate(self._waiting) if number in numbers]
        self._waiting = [step for number, step in enumerate(self._waiting) if number not in numbers]
        for step in self._waiting:
            step.passed += 1
        return chosen

    def _execute(self, steps: list[Step]) -> None:
        begin = time.perf_counter()
        try:
            results = self._values(steps)
        except Exception as error:
            for step in steps:
                step.error = error
            return
        ms = (time.perf_counter() - begin) * 1e3
        for step, values in zip(steps, results, strict=True):
            try:
                step.outputs = step.trajectory.commit(step.planned, values, ms)
            except MoecaError as error:
                step.error = error
        self.calls.append(CallRecord(steps[0].planned.name, len(steps), sum(step.batch for step in steps), ms))

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
