"""What one handle runs: programs, the weights that they are called with, the trajectories that are under way."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

import torch

from moeca_compile.engine.arrangement import Arrangement
from moeca_compile.engine.hoisted import Past
from moeca_compile.engine.program import Program
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.engine.trajectory_state import TrajectoryState
from moeca_compile.ops.packed import Packs
from moeca_compile.options import Options
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Schedule

Lock = AbstractContextManager[Any]
Stamp = tuple[int, int, int]  # of one weight: its id, where it lies, its version

_version = attrgetter("_version")


class WeightBinding:
    """The weights that a graph was last called with, as they were.

    Attributes:
        gone: filled when one of them is collected.
        ids: of the tensors.
        kinds: shape, dtype and device of each.
        kind: a number for `kinds`, given by the graph.
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
        """Of each weight."""
        return list(zip(self.order, *self.stamp, strict=True))


class HandleRuntime:
    """What one handle runs.

    Attributes:
        handle: its compile context (a weak reference).
        programs: by what they compute, the latest used last.
        latest: what `stats` shows.
        all: of every trajectory that lives.
        ids: of the weights.
    """

    def __init__(self, handle: object | None, options: Options, schedule: Schedule, warned: Warned, lock: Lock) -> None:
        self.handle = None if handle is None else weakref.ref(handle)
        self.options, self.schedule, self.warned, self.lock = options, schedule, warned, lock
        self.programs: OrderedDict[Hashable, Program] = OrderedDict()
        self.ids: frozenset[int] = frozenset()
        self.past = Past()
        self.plain = TrajectoryState(latent_jump=options.latent_jump, past=self.past)  # of calls outside any trajectory
        self.latest = self.plain
        self.all: weakref.WeakSet[TrajectoryState] = weakref.WeakSet((self.plain,))
        self.packs = Packs()
        self.refused: dict[Hashable, str] = {}  # why graphs for such calls run uncached
        self._placed: dict[Hashable, tuple[Hashable, Arrangement | None]] = {}
        self._weights: dict[int, WeightBinding] = {}  # by graph
        self._stamps: dict[str, Stamp] = {}

    def invalidate_if_weights_changed(
        self, graph: int, labels: Sequence[str], weights: Sequence[torch.Tensor]
    ) -> WeightBinding:
        """What `graph` is called with. All state of the handle is dropped if a weight was replaced, changed in place,
        or had its storage swapped."""
        known = self._weights.get(graph)
        if (
            known is not None
            and not known.gone
            and known.order == list(map(id, weights))
            and known.stamp == _stamp(weights)
        ):
            return known
        with self.lock:
            binding = self._weights[graph] = WeightBinding(weights)
            stamps = dict(zip(labels, binding.stamps(), strict=True))
            died = any(one.gone for one in self._weights.values())
            if died or any(self._stamps.get(label, stamp) != stamp for label, stamp in stamps.items()):
                self.packs = Packs()
                for running in list(self.all):
                    running.forget()
            for number in [number for number, one in self._weights.items() if one.gone]:
                del self._weights[number]
            self._stamps.update(stamps)
            self.ids = frozenset().union(*(one.ids for one in self._weights.values()))
        return binding

    def running(self, trajectory: Trajectory | None) -> TrajectoryState:
        """The handle's state in `trajectory`; None: outside any."""
        with self.lock:
            if trajectory is None:
                self.latest = self.plain
            else:
                if self not in trajectory.states:
                    trajectory.states[self] = TrajectoryState(trajectory, past=self.past)
                self.latest = trajectory.states[self]
                self.all.add(self.latest)
            return self.latest

    def find(self, key: Hashable) -> tuple[Program, Arrangement | None] | None:
        """The program that was placed under `key`, if it is still kept, and how its arguments are arranged."""
        with self.lock:
            placed = self._placed.get(key)
            if placed is None:
                return None
            what, how = placed
            self.programs.move_to_end(what)
            return self.programs[what], how

    def place(self, keys: Sequence[Hashable], program: Program) -> None:
        """Keep a program under `keys`, the last of which says what it computes; the least recently used program goes,
        and with it all its state."""
        what = keys[-1]
        with self.lock:
            self.programs[what] = program
            self._placed.update(dict.fromkeys(keys, (what, None)))
            while len(self.programs) > self.options.max_signatures:
                gone, _ = self.programs.popitem(last=False)
                self._placed = {key: one for key, one in self._placed.items() if one[0] != gone}

    def place_beside(self, key: Hashable, known: Hashable, how: Arrangement | None) -> None:
        """Let the program under `known` serve the calls of `key`, with its arguments arranged."""
        with self.lock:
            self._placed[key] = (self._placed[known][0], how)

    def keys_of(self, graph: int) -> list[tuple[Any, ...]]:
        """Of the calls of one of Dynamo's graphs."""
        with self.lock:
            return [key for key in self._placed if isinstance(key, tuple) and key[0] == graph]

    def serving(self, graph: int) -> dict[Hashable, Program]:
        """The programs that serve the calls of one of Dynamo's graphs."""
        with self.lock:
            whats = {self._placed[key][0] for key in self.keys_of(graph)}
            return {what: program for what, program in self.programs.items() if what in whats}

    def knows(self, graph: int) -> bool:
        """Whether it has been called through this graph."""
        return graph in self._weights

    def reset(self) -> None:
        """Forget all state, in every trajectory."""
        with self.lock:
            for running in list(self.all):
                running.reset()


def _stamp(weights: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    try:  # hundreds, at every step: nothing slower will do
        versions = list(map(_version, weights))
    except RuntimeError:  # inference tensors have none
        versions = [-1 if weight.is_inference() else weight._version for weight in weights]
    return list(map(torch.Tensor.data_ptr, weights)), versions
