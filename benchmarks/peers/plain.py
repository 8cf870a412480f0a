"""Nothing cached: eager and compiled, as shipped and prepared, and the solvers with fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from benchmarks.peers.solvers import Solver, adams_bashforth, dpm_solver, euler
from benchmarks.peers.way import Family, Plain
from benchmarks.peers.workload import Workload

BASELINE = "torch.compile, prepared"
SHIPPED = "torch.compile, as shipped"
FEWER = (38, 25, 20, 17, 13, 10, 8)


def baseline(work: Workload) -> Plain:
    """What every other contender is timed against."""
    return Plain(torch.compile(work.prepared()), work)


def uncached() -> list[Family]:
    """Without a cache; the baseline itself is timed beside them."""
    return [
        Family("eager, as shipped", "plain", "a host-side loop over the experts", _one(lambda work: work.shipped())),
        Family(
            SHIPPED,
            "plain",
            "Dynamo breaks at every expert loop",
            _one(lambda work: torch.compile(work.shipped())),
            cold=True,
            guarded=True,
        ),
        Family(
            "eager, prepared",
            "plain",
            "moeca_compile.prepare made the dispatch one operator",
            _one(lambda work: work.prepared()),
        ),
        Family(
            "the baseline, compiled anew",
            "plain",
            "one graph",
            _one(lambda work: torch.compile(work.prepared())),
            cold=True,
        ),
    ]


def _one(model: Callable[[Workload], Any]) -> Callable[[Workload], Mapping[str, Plain]]:
    return lambda work: {"": Plain(model(work), work)}


def fewer_steps(counts: tuple[int, ...] = FEWER) -> list[Family]:
    """The baseline's program, called less often; counts are of 50 steps, others are cut by the same factor."""
    solvers: dict[str, tuple[Solver, str]] = {
        "fewer steps, Euler": (euler, "the same solver"),
        "fewer steps, Adams-Bashforth 2": (adams_bashforth, "second-order multistep in the time of the flow"),
        "fewer steps, DPM-Solver++ 2M": (
            dpm_solver,
            "second-order multistep in the log-SNR of the flow; its paper asks for 15 to 20 steps with guidance",
        ),
    }

    @cache
    def model(work: Workload) -> Any:
        return torch.compile(work.prepared())

    def open_with(solver: Solver) -> Callable[[Workload], Mapping[str, Plain]]:
        def opened(work: Workload) -> Mapping[str, Plain]:
            fewer = [max(2, round(count * work.size.steps / 50)) for count in counts]
            return {f"{steps} steps": Plain(model(work), work, steps, solver) for steps in fewer}

        return opened

    return [Family(name, "fewer steps", note, open_with(solver)) for name, (solver, note) in solvers.items()]
