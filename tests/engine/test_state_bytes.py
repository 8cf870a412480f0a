"""The state bytes that `explain` reports before a run are those that the run holds: by its records, and in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.frontend.entry import ENTRIES
from moeca_compile.frontend.owner import handle_of
from moeca_compile.schedule import Action, Partial, Schedule
from tests.models import DiT

C, R, F, P = Action.COMPUTE, Action.REUSE, Action.FORECAST, Partial(0.25, 0.25)
KEYS = ("blocks.0", "blocks.0.moe")
STEPS = 8

SCHEDULES = {
    "full": Schedule.full(),
    "order 0": Schedule.uniform(3, order=0),
    "order 1": Schedule.uniform(3, order=1),
    "order 2": Schedule.uniform(2, order=2),
    "some regions alone": Schedule(((C, C), (C, F), (R, C), (R, R)) * 2, KEYS, order=1),
    "adaptive": Schedule.by_drift(0.02),
    "partial": Schedule(((C, C), (P, P), (P, Partial(0, 0)), (C, P)) * 2, KEYS, order=1),
}


def model() -> DiT:
    torch.manual_seed(0)
    return DiT(depth=1, dim=16, heads=2, num_experts=3, top_k=2, hidden=8, size=4, channels=2).eval()


def inputs(step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return noise * (1 - 0.05 * step), torch.full((2,), 900.0 - 50 * step), torch.tensor([1, 2])


def state_of(compiled: torch.nn.Module) -> Iterator[Tensor]:
    """Every tensor that the runtime keeps from step to step."""
    runtimes = [runtime for entry in ENTRIES for runtime in entry.runtimes.values()]
    for runtime in runtimes:
        if runtime.handle is not None and runtime.handle() is handle_of(compiled):
            for running in runtime.trajectories.states():
                for graph in running.by_schedule.values():
                    for stream in graph.streams.values():
                        yield from (tensor for tensor in stream.state.tensors if tensor is not None)


def memory_of(tensors: Iterator[Tensor]) -> int:
    """What they occupy: storages, each once, and all of it where a tensor is only a part."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def told_and_held(schedule: Schedule, inner: str) -> tuple[int, int, int]:
    """What `explain` tells, what `stats` says after a run, and what lies in memory."""
    torch._dynamo.reset()
    compiled = moeca.compile(model(), schedule=schedule, order=schedule.order, inner=inner)
    with torch.no_grad():
        told = moeca.explain(compiled, *inputs()).state_bytes
        with moeca.trajectory(compiled, steps=STEPS):
            for step in range(STEPS):
                compiled(*inputs(step))
            return told, moeca.stats(compiled).state_bytes, memory_of(state_of(compiled))


OFTEN = ("order 1", "partial")


@pytest.mark.parametrize(
    "name", [*OFTEN, *(pytest.param(one, marks=pytest.mark.slow) for one in SCHEDULES if one not in OFTEN)]
)
def test_told_is_held(name: str) -> None:
    told, held, lying = told_and_held(SCHEDULES[name], "eager")
    assert told == held == lying
    assert (told > 0) == (name != "full")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["order 0", "order 2", "partial"])
def test_told_is_held_by_compiled_programs(name: str) -> None:
    told, held, lying = told_and_held(SCHEDULES[name], "inductor")
    assert told == held == lying
