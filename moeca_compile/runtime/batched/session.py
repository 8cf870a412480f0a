"""Requests that come at any time and are at different steps share the calls of a bundle.

batched = BatchedSession.open("digits.moeca", budget=64 * 2**20)
requests = [batched.submit(sampler(seed)) for seed in range(8)]   # generators: yield inputs, get outputs
batched.run()
images = [request.result() for request in requests]
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeca_compile.errors import StateError
from moeca_compile.graph.variant import StateSlot
from moeca_compile.runtime.batched.budget import lanes_in, needs_of
from moeca_compile.runtime.batched.calls import Policy, cheap_first
from moeca_compile.runtime.batched.invariance import refuse_if_batches_differ
from moeca_compile.runtime.batched.pool import PooledState, StatePool
from moeca_compile.runtime.batched.requests import Step
from moeca_compile.runtime.batched.scheduler import Scheduler
from moeca_compile.runtime.batched.together import Together
from moeca_compile.runtime.bundle.bfloat16 import stored_dtype
from moeca_compile.runtime.bundle.feeds import Arrays, admit, arrays_of
from moeca_compile.runtime.bundle.manifest import COEFFICIENTS, NOW
from moeca_compile.runtime.output_rows import ComputedRow, ForecastRow
from moeca_compile.runtime.providers.onnxruntime import CPU
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.trajectory import PlannedStep, Trajectory, state_layout


class PooledTrajectory(Trajectory):
    """A denoising loop whose state is in a batched session's pool and whose steps share calls.

    `run` waits until its step was part of a call. So each of several trajectories needs a thread of its own.

    Attributes:
        lanes: the first lane, and how many; None: it has none yet, or none any more.
    """

    def __init__(self, owner: BatchedSession, steps: int | None, stream: str) -> None:
        super().__init__(owner.session, steps, stream)
        self._owner = owner
        self.lanes: tuple[int, int] | None = None

    def close(self) -> None:
        """Give the lanes back and refuse further calls."""
        super().close()
        self._owner.leave(self)

    def _run(self, inputs: Mapping[str, Any]) -> Arrays:
        outputs: Arrays = self._owner.serve(self, inputs)
        return outputs

    def _new_state(self, batch: int) -> StreamState:
        assert self.lanes is not None  # a step is planned when its trajectory has lanes
        first, count = self.lanes
        if batch != count:
            raise StateError(f"the trajectory has room for batch {count}, this call has {batch}: open another one")
        return PooledState(state_layout(self.session.manifest, batch), self._owner.pool, first, batch)


class BatchedSession(Scheduler):
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
        self.session, self._together = session, Together(session)
        if session.manifest.batch is not None:
            max_batch = min(max_batch, session.manifest.batch[1])
        lanes = lanes_in(budget, needs_of(session.manifest), max_batch)
        pool = StatePool(state_layout(session.manifest, 1), self._together.axes, lanes, session.manifest.regions, zeros)
        super().__init__(pool, min(max_batch, lanes), policy, gather)
        if exact:
            refuse_if_batches_differ(session, self._together, self.max_batch)

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

    def _new_trajectory(self, steps: int | None, stream: str) -> PooledTrajectory:
        return PooledTrajectory(self, steps, stream)

    def _batch_of(self, inputs: Mapping[str, Any]) -> int:
        manifest = self.session.manifest
        return admit(manifest, arrays_of(manifest, inputs))[1]

    def _key(self, step: Step) -> Hashable:
        """Steps with equal keys can share a call: same variant, and equal values of what holds for a whole call."""
        variant, feeds = step.planned.variant, step.planned.feeds
        if isinstance(variant, ForecastRow):
            return id(variant)  # each runs by itself
        common = (*self._together.shared, *(name for name in (COEFFICIENTS, NOW) if name in feeds))
        return id(variant), *(np.asarray(feeds[name]).tobytes() for name in common)

    def _values(self, steps: list[Step]) -> list[list[Any]]:
        """What the steps' variant gives each of them."""
        plans: list[PlannedStep] = [step.planned for step in steps]
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


def zeros(slot: StateSlot, shape: Sequence[int]) -> Any:
    """The pool's array of a slot."""
    return np.zeros(shape, stored_dtype(slot.dtype))
