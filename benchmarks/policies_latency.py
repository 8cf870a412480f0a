"""What a schedule costs in time: its steps, compiled, among steps of the same model with everything computed."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor

import moeca_compile as moeca
from examples import digits
from moeca_compile.schedule import Schedule

DIGITS, SEED = 16, 6000  # with guidance in one call: 32 samples a step
EVERY = 5  # after so many steps one with everything computed is timed


class Timed:
    """The cached model, and now and then the uncached one on the same inputs."""

    def __init__(self, cached: Any, uncached: Any) -> None:
        self.cached, self.uncached = cached, uncached
        self.calls, self.full_ms = 0, list[float]()

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.calls % EVERY == 0:
            begin = time.perf_counter()
            self.uncached(*inputs)
            self.full_ms.append(1e3 * (time.perf_counter() - begin))
        self.calls += 1
        result: Tensor = self.cached(*inputs)
        return result


def compiled(network: Any, schedule: Schedule | str) -> Any:
    """Ready to be timed."""
    model = moeca.compile(network, schedule=schedule, pack_experts=True)
    inputs = (torch.zeros(2 * DIGITS, 1, 16, 16), torch.full((2 * DIGITS,), 1000.0), torch.zeros(2 * DIGITS).long())
    with torch.no_grad():
        moeca.warmup(model, *inputs)
        model(*inputs)
    return model


@cache
def everything(network: Any) -> Any:
    return compiled(network, "full")


def time_share(network: Any, schedule: Schedule, steps: int) -> float:
    """Time of a trajectory under the schedule / the same with everything computed; medians by kind of step.

    Both run with packed experts: few rows an expert need them most, and full steps gain too.
    """
    cached, uncached = compiled(network, schedule), everything(network)
    timed = Timed(cached, uncached)
    with moeca.trajectory(cached, steps=steps):
        digits.sample(timed, seed=SEED, n=DIGITS, steps=steps)
    records = moeca.stats(cached).steps
    counts = Counter(one.variant for one in records)
    own = sum(
        count * statistics.median(one.ms + one.overhead_ms for one in records if one.variant == name)
        for name, count in counts.items()
    )
    return own / (steps * statistics.median(timed.full_ms))
