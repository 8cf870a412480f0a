"""Nothing cached: eager and compiled, as shipped and prepared, and the solvers with fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from benchmarks.peers.solvers import Solver, adams_bashforth, dpm_solver, euler
from benchmarks.peers.way import Family, Plain
from benchmarks.peers.workload import Size, prepared, shipped

BASELINE = "torch.compile, prepared"
SHIPPED = "torch.compile, as shipped"
FEWER = (38, 25, 20, 17, 13, 10, 8)


def baseline(size: Size) -> Plain:
    """What every other contender is timed against."""
    return Plain(torch.compile(prepared()), size)


def uncached() -> list[Family]:
    """Without a cache; the baseline itself is timed beside them."""
    return [
        Family("eager, as shipped", "plain", "a host-side loop over the experts", _one(shipped)),
        Family(SHIPPED, "plain", "Dynamo breaks at every expert loop", _one(lambda: torch.compile(shipped())), True),
        Family("eager, prepared", "plain", "moeca_compile.prepare made the dispatch one operator", _one(prepared)),
        Family("the baseline, compiled anew", "plain", "one graph", _one(lambda: torch.compile(prepared())), True),
    ]


def _one(model: Callable[[], Any]) -> Callable[[Size], Mapping[str, Plain]]:
    return lambda size: {"": Plain(model(), size)}


def fewer_steps() -> list[Family]:
    """The baseline's program, called less often; a schedule of `size.steps` is cut by the same factor."""
    solvers: dict[str, tuple[Solver, str]] = {
        "fewer steps, Euler": (euler, "the same solver"),
        "fewer steps, Adams-Bashforth 2": (adams_bashforth, "second-order multistep in the time of the flow"),
        "fewer steps, DPM-Solver++ 2M": (
            dpm_solver,
            "second-order multistep in the log-SNR of the flow; its paper asks for 15 to 20 steps with guidance",
        ),
    }

    @cache
    def model() -> Any:
        return torch.compile(prepared())

    def open_with(solver: Solver) -> Callable[[Size], Mapping[str, Plain]]:
        def opened(size: Size) -> Mapping[str, Plain]:
            counts = [max(2, round(count * size.steps / 50)) for count in FEWER]
            return {f"{steps} steps": Plain(model(), size, steps, solver) for steps in counts}

        return opened

    return [Family(name, "fewer steps", note, open_with(solver)) for name, (solver, note) in solvers.items()]
