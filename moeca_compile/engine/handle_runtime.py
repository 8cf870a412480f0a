"""The run-time state of one handle: its programs, the weights that they are called with, and its trajectories."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from moeca_compile.engine.freeing.weights import FreedWeights
from moeca_compile.engine.trajectories.group import TrajectoryGroup
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.engine.trajectory_state import TrajectoryState
from moeca_compile.lowering.inductor.sizes.shared import SharedSizes
from moeca_compile.ops.packed import Packs
from moeca_compile.options import Options
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Schedule

if TYPE_CHECKING:
    from moeca_compile.engine.arrangement import Arrangement
    from moeca_compile.engine.program import Program

Lock = AbstractContextManager[Any]
Stamp = tuple[int, int, int]  # of one weight: id, data pointer, version counter

_version = attrgetter("_version")


class WeightBinding:
    """The weights that a graph was last called with, and their stamps at that time.

    Attributes:
        gone: gets an element when one of the weights is collected.
        order: ids of the weights, in the graph's order.
        stamp: data pointers and version counters, in the same order.
        ids: of the weights.
        kinds: shape, dtype and device of each weight.
        kind: the graph's number for `kinds`; None: not assigned yet.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.gone: list[object] = []
        self._refs = [weakref.ref(weight, self.gone.append) for weight in weights]
        self.order = list(map(id, weights))
        self.stamp = _stamp(weights)
        self.ids = frozenset(self.order)
        self.kind: int | None = None
        self.kinds = tuple((tuple(weight.shape), weight.dtype, weight.device) for weight in weights)

    def stamps(self) -> list[Stamp]:
        """One stamp for each weight."""
        return list(zip(self.order, *self.stamp, strict=True))


class HandleRuntime:
    """The run-time state of one handle.

    Attributes:
        handle: the compile context (a weak reference); None: a call without torch.compile.
        options, schedule: as they were read for the handle.
        warned: counts the handle's warnings.
        lock: protects all containers below.
        programs: by a key that says what they compute, the latest used last.
        models: ids of the models, where they are known. A model keeps its id when hooks replace its weights.
        ids: of the weights and the models.
        trajectories: that the handle's calls belong to; those of handles compiled together are the same.
        packs: packed expert weights.
        freed: weights that `free_hoisted` freed.
        sizes: programs that serve several sizes.
        refused: by key of a call, why its graph runs uncached.
    """

    def __init__(
        self, handle: object | None, options: Options, schedule: Schedule, warned: Warned, lock: Lock,
        trajectories: TrajectoryGroup | None = None,
    ) -> None:  # fmt: skip
        self.handle = None if handle is None else weakref.ref(handle)
        self.options, self.schedule, self.warned, self.lock = options, schedule, warned, lock
        self.programs: OrderedDict[Hashable, Program] = OrderedDict()
        self.models: frozenset[int] = frozenset()
        self.ids: frozenset[int] = frozenset()
        self.trajectories = trajectories or TrajectoryGroup(options.latent_jump)
        self.packs = Packs()
        self.freed = FreedWeights(options.free_mode, _weakly(self.accept_moved))
        self.sizes = SharedSizes()
        self.refused: dict[Hashable, str] = {}
        self._placed: dict[Hashable, tuple[Hashable, Arrangement | None]] = {}  # by key of a call, a key of `programs`
        self._weights: dict[int, WeightBinding] = {}  # by number of the graph
        self._stamps: dict[str, Stamp] = {}  # by label of the weight

    def invalidate_if_weights_changed(
        self, graph: int, labels: Sequence[str], weights: Sequence[torch.Tensor]
    ) -> WeightBinding:
        """Bind `graph` (a number) to the weights of a call.

        All state of the handle is dropped if a weight was replaced, changed in place, or had its storage swapped.

        Args:
            graph: number of Dynamo's graph.
            labels: names of the weights.
            weights: one for each label.
        """
        bound = self._weights.get(graph)
        if (
            bound is not None
            and not bound.gone
            and bound.order == list(map(id, weights))
            and bound.stamp == _stamp(weights)
        ):
            return bound
        with self.lock:
            binding = self._weights[graph] = WeightBinding(weights)
            stamps = dict(zip(labels, binding.stamps(), strict=True))
            collected = [number for number, other in self._weights.items() if other.gone]
            if collected or any(self._stamps.get(label, stamp) != stamp for label, stamp in stamps.items()):
                self.packs = Packs()
                self.trajectories.forget()
                for program in self.programs.values():
                    if program.freeing is not None:
                        program.freeing.plans.clear()
            for number in collected:
                del self._weights[number]
            self._stamps.update(stamps)
            self._note_ids()
        return binding

    def accept_weights(self, graph: int, labels: Sequence[str], weights: Sequence[torch.Tensor]) -> None:
        """Take these weights for those that the graph was called with: the model's own hooks put them there."""
        bound = self._weights.get(graph)
        if bound is not None and bound.order == list(map(id, weights)) and bound.stamp == _stamp(weights):
            return
        with self.lock:
            binding = self._weights[graph] = WeightBinding(weights)
            self._stamps.update(zip(labels, binding.stamps(), strict=True))
            self._note_ids()

    def _note_ids(self) -> None:
        self.ids = self.models.union(*(bound.ids for bound in self._weights.values()))

    def accept_moved(self, addresses: Mapping[int, int]) -> None:
        """Take weights, by id, for unchanged at new addresses."""
        with self.lock:
            for bound in self._weights.values():
                pointers, versions = bound.stamp
                bound.stamp = (
                    [addresses.get(key, old) for key, old in zip(bound.order, pointers, strict=True)],
                    versions,
                )
            for label, (key, pointer, version) in self._stamps.items():
                self._stamps[label] = key, addresses.get(key, pointer), version

    def running(self, trajectory: Trajectory | None) -> TrajectoryState:
        """The handle's state in `trajectory`; None: outside any."""
        group = self.trajectories
        with group.lock:
            if trajectory is None:
                group.latest = group.outside
            else:
                if group not in trajectory.states:
                    trajectory.states[group] = TrajectoryState(
                        trajectory,
                        timestep_history=group.timestep_history,
                        history=group.history,
                        hands_over=group.hands_over,
                    )
                group.latest = trajectory.states[group]
                group.alive.add(group.latest)
            return group.latest

    def find(self, key: Hashable) -> tuple[Program, Arrangement | None] | None:
        """The program that was placed under `key`, if it is still there, and how its arguments are arranged."""
        with self.lock:
            placed = self._placed.get(key)
            if placed is None:
                return None
            program_key, arrangement = placed
            self.programs.move_to_end(program_key)
            return self.programs[program_key], arrangement

    def place(self, keys: Sequence[Hashable], program: Program) -> None:
        """Store a program under `keys`, the last of which says what it computes. Past `max_signatures` programs, the
        least recently used one is dropped with all its state."""
        program_key = keys[-1]
        with self.lock:
            self.programs[program_key] = program
            self._placed.update(dict.fromkeys(keys, (program_key, None)))
            while len(self.programs) > self.options.max_signatures:
                dropped, _ = self.programs.popitem(last=False)
                self._placed = {key: placed for key, placed in self._placed.items() if placed[0] != dropped}

    def place_beside(self, key: Hashable, placed_key: Hashable, arrangement: Arrangement | None) -> None:
        """Let the program under `placed_key` serve the calls of `key` too, with its arguments arranged."""
        with self.lock:
            self._placed[key] = (self._placed[placed_key][0], arrangement)

    def keys_of(self, graph: int) -> list[tuple[Any, ...]]:
        """The keys of calls of one of Dynamo's graphs."""
        with self.lock:
            return [key for key in self._placed if isinstance(key, tuple) and key[0] == graph]

    def serving(self, graph: int) -> dict[Hashable, Program]:
        """The programs that serve the calls of one of Dynamo's graphs."""
        with self.lock:
            program_keys = {self._placed[key][0] for key in self.keys_of(graph)}
            return {key: program for key, program in self.programs.items() if key in program_keys}

    def has_run(self, graph: int) -> bool:
        """Whether the handle was called through this graph."""
        return graph in self._weights

    @property
    def on_host(self) -> bool:
        """Whether all weights of the calls so far are in the host's memory."""
        with self.lock:
            return all(device.type == "cpu" for bound in self._weights.values() for _, _, device in bound.kinds)

    def reset(self) -> None:
        """Drop all state and records, in every trajectory."""
        self.trajectories.reset()


def _stamp(weights: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Data pointers and version counters of the weights."""
    try:  # hundreds of weights at every step: `map` is the fastest way
        versions = list(map(_version, weights))
    except RuntimeError:  # inference tensors have no version counter
        versions = [-1 if weight.is_inference() else weight._version for weight in weights]
    return list(map(torch.Tensor.data_ptr, weights)), versions


def _weakly(method: Callable[[Mapping[int, int]], None]) -> Callable[[Mapping[int, int]], None]:
    """A call of the method, which doesn't keep its object alive."""
    ref = weakref.WeakMethod(method)

    def call(addresses: Mapping[int, int]) -> None:
        alive = ref()
        if alive is not None:
            alive(addresses)

    return call
