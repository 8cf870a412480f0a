"""The ways of running one model that are compared: its plain code, computed in full, and cached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moeca_compile.engine.intercept import intercepting
from moeca_compile.engine.trajectories.statistics import stats_of
from moeca_compile.errors import StateError
from moeca_compile.frontend.backend import read_options
from moeca_compile.frontend.denoisers import parts_of
from moeca_compile.frontend.handles import states_of
from moeca_compile.frontend.model_arguments import compiled_parts, plain_module, swapped_in
from moeca_compile.frontend.owner import handle_of
from moeca_compile.inspect.comparison import CACHED, COMPUTED, PLAIN
from moeca_compile.options import Options
from moeca_compile.planner.rollout import Rollout
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.trajectory import Trajectory
from moeca_compile.schedule import Schedule


@dataclass(frozen=True)
class Facts:
    """What is told of the cached run.

    Attributes:
        schedule: how it was made.
        mac_fraction: MACs that ran / MACs with everything computed.
        state_bytes: of all cached state.
        steps: of the last trajectory.
        uncached: why nothing was cached; "": something was.
    """

    schedule: str
    mac_fraction: float
    state_bytes: int
    steps: int
    uncached: str = ""


class CompiledModel:
    """A model or pipeline that is compiled with moeca.

    Args:
        model: the argument of `compare`.

    Attributes:
        name: of its class.
        ways: of running it, by name.
        timesteps: that the sampler is to be given for the cached run; empty: its own.

    Raises:
        StateError: it isn't compiled with moeca, or is a compiled function.
    """

    ways = (PLAIN, COMPUTED, CACHED)

    def __init__(self, model: Any) -> None:
        self._model, self._handles = model, compiled_parts(model, "compare")
        if not all(isinstance(handle, torch.nn.Module) for handle in self._handles):
            raise StateError("compare: a compiled function has no plain model beside it. Compile the model itself")
        parts = parts_of(model)
        names = [type(model)] if parts else [type(plain_module(handle)) for handle in self._handles]
        self.name = " and ".join(name.__name__ for name in names)
        schedules = (read_options(Options(), handle_of(handle))[1] for handle in self._handles)
        self.timesteps = next((schedule.timesteps for schedule in schedules if schedule.searched_timesteps), ())

    def running(self, way: str) -> AbstractContextManager[Any]:
        """A context in which the model runs one of the `ways`; it gives what the sampler is called with."""
        # made at each use: methods kept on the object would be a cycle, and keep the handles until garbage collection
        return {PLAIN: self._plain, COMPUTED: self._computed, CACHED: self._cached}[way]()

    def facts(self) -> Facts:
        """Of the last cached run."""
        states = list(dict.fromkeys(state for handle in self._handles for state in states_of(handle)))
        stats = stats_of(states)
        schedules = dict.fromkeys(
            program.schedule.made_by for state in states for program in state.runtime.programs.values()
        )
        steps = 1 + max((record.step for record in stats.steps), default=-1)
        return Facts(" and ".join(schedules), stats.mac_fraction, stats.state_bytes, steps, stats.uncached)

    def _argument(self, modules: Sequence[Any]) -> Any:
        """What the sampler is called with: the only model, a list where one was given, or the pipeline of several."""
        if isinstance(self._model, (list, tuple)):
            return type(self._model)(modules)
        return modules[0] if len(modules) == 1 else self._model

    @contextmanager
    def _cached(self) -> Iterator[Any]:
        yield self._argument(self._handles)

    @contextmanager
    def _computed(self) -> Iterator[Any]:
        """Every step computed, by the same variants."""
        with ExitStack() as stack:
            for handle in self._handles:
                rollout = Rollout(lambda program: program.compiled(Schedule.full(), state_schedule=program.schedule))
                stack.enter_context(intercepting(rollout, handle_of(handle)))
            yield self._argument(self._handles)

    @contextmanager
    def _plain(self) -> Iterator[Any]:
        """The model's own code. Expert dispatches that `prepare` replaced are seen by compilers alone."""
        modules = [plain_module(handle) for handle in self._handles]
        with swapped_in(modules, self._model):
            yield self._argument(modules)


class BundleModel:
    """What a sampler of a bundle is called with: `model({"x": x, "t": t})` makes one step.

    Args:
        session: of the bundle.
        is_cached: steps belong to trajectories. False: every call computes everything.
    """

    def __init__(self, session: Session, is_cached: bool) -> None:
        self._session, self._is_cached = session, is_cached
        self.trajectories: dict[str, Trajectory] = {}

    def __call__(self, inputs: Mapping[str, Any], stream: str = "") -> Mapping[str, Any]:
        """Run the next step of a guidance stream.

        Args:
            inputs: arrays by name, as for `Session.run`.
            stream: its name, where a step has several calls.

        Returns:
            Arrays by output name.
        """
        if not self._is_cached:
            return self._session.run(inputs)
        if stream not in self.trajectories:
            self.trajectories[stream] = self._session.trajectory(stream=stream)
        return self.trajectories[stream].run(inputs)


class CompiledBundle:
    """A session, with the attributes and methods of `CompiledModel`. A bundle has no plain model."""

    ways = (COMPUTED, CACHED)

    def __init__(self, session: Session) -> None:
        self._session = session
        self.name = session.manifest.model.name
        self.timesteps = session.schedule.timesteps if session.schedule.searched_timesteps else ()
        self._facts = Facts(session.schedule.made_by, 1.0, 0, 0)

    def running(self, way: str) -> AbstractContextManager[Any]:
        """As `CompiledModel.running`."""
        return {COMPUTED: self._computed, CACHED: self._cached}[way]()

    def facts(self) -> Facts:
        """Of the last cached run."""
        return self._facts

    @contextmanager
    def _computed(self) -> Iterator[Any]:
        yield BundleModel(self._session, is_cached=False)

    @contextmanager
    def _cached(self) -> Iterator[Any]:
        model = BundleModel(self._session, is_cached=True)
        try:
            yield model
            stats = [trajectory.stats() for trajectory in model.trajectories.values()]
            records = [record for each in stats for record in each.steps]
            full = sum(record.full_macs for record in records)
            fraction = sum(record.macs for record in records) / full if full else 1.0
            state_bytes = sum(each.state_bytes for each in stats)
            steps = max((len(each.steps) for each in stats), default=0)
            self._facts = Facts(self._session.schedule.made_by, fraction, state_bytes, steps)
        finally:
            for trajectory in model.trajectories.values():
                trajectory.close()
