"""What is measured: a way draws a batch of images; a family is one contender with its knob swept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from benchmarks.peers.solvers import Solver, euler
from benchmarks.peers.workload import Batch, Workload

Side = Literal["plain", "fewer steps", "peer", "moeca", "control"]


class Way(Protocol):
    """One setting of one contender."""

    def sample(self, batch: Batch) -> Tensor:
        """A whole trajectory, nothing left of the one before: (n,C,H,W)."""
        ...

    def macs(self) -> float:
        """What the last trajectory computed, as a share of the uncached one's multiply-accumulates."""
        ...

    def state_bytes(self) -> int:
        """What the contender keeps between steps."""
        ...

    def forget(self) -> None:
        """Drop what is kept, so that the next trajectory allocates it anew."""
        ...


@runtime_checkable
class Foretold(Way, Protocol):
    """A contender that tells its state before it runs."""

    def told_bytes(self) -> int:
        """What a trajectory will keep, without what is hoisted; asked before the first one."""
        ...

    def held_bytes(self) -> int:
        """The same of the last trajectory, as it was kept."""
        ...


@dataclass(frozen=True)
class Family:
    """A contender.

    note: what its documentation recommends, in our words, and how it is run here.
    open: builds the models and gives each setting of the knob; nothing is compiled before the first trajectory.
    cold: compiled with Inductor's caches on disk empty, so that its compile seconds say something.
    guarded: what its graphs do depends on values that only Dynamo's guards look at, so that it has to be timed with
        them; all others are timed without.
    """

    name: str
    side: Side
    note: str
    open: Callable[[Workload], Mapping[str, Way]]
    cold: bool = False
    guarded: bool = False


class Plain:
    """A model that keeps nothing, eager or compiled, and a solver."""

    def __init__(self, model: Any, work: Workload, steps: int | None = None, solver: Solver = euler) -> None:
        self.model, self.work, self.steps, self.solver = model, work, steps or work.size.steps, solver

    def sample(self, batch: Batch) -> Tensor:
        return self.work.draw(self.model, batch, self.steps, self.solver)

    def macs(self) -> float:
        return self.steps / self.work.size.steps

    def state_bytes(self) -> int:
        return 0

    def forget(self) -> None:
        pass


def bytes_in(value: Any, seen: set[int] | None = None) -> int:
    """The storage of all tensors that can be reached from an object, each once; modules are not entered."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, torch.nn.Module):
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, Mapping):
        return sum(bytes_in(one, seen) for one in value.values())
    if isinstance(value, list | tuple | set):
        return sum(bytes_in(one, seen) for one in value)
    return sum(bytes_in(one, seen) for one in getattr(value, "__dict__", {}).values())
