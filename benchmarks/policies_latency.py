"""What a schedule costs in time: its kinds of step, compiled, among steps of the same model with everything computed.

A kind of step takes the same time wherever it stands, so schedules with the same kinds are measured once: in a short
schedule that repeats them. An adaptive one chooses its steps while it runs, and is run as a whole.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import moeca_compile as moeca
from examples import digits
from moeca_compile.schedule import Schedule

DIGITS, SEED = 16, 6000  # with guidance in one call: 32 samples a step
EVERY = 3  # after so many steps one with everything computed is timed
ROUNDS = 8  # of each kind of step
MOST = 48  # steps of a short schedule

_SHARES: dict[Hashable, dict[str, float]] = {}


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
    if schedule.adaptive is not None:
        shares, counts = timed(network, schedule, steps)
        return sum(counts[name] * share for name, share in shares.items()) / steps
    kinds = schedule.distinct_rows()
    counts = Counter(f"v{kinds.index(row)}" for row in schedule.rows)
    key = id(network), kinds, schedule.order, schedule.control
    if key not in _SHARES:
        rounds = min(ROUNDS, MOST // len(kinds))
        _SHARES[key] = timed(network, replace(schedule, rows=kinds * rounds, timesteps=()), len(kinds) * rounds)[0]
    return sum(counts[name] * share for name, share in _SHARES[key].items()) / len(schedule.rows)


def timed(network: Any, schedule: Schedule, steps: int) -> tuple[dict[str, float], Counter[str]]:
    """By kind of step (variant) its share of a full step's time, and how often the run took it."""
    model = compiled(network, schedule)
    both = Timed(model, everything(network))
    with moeca.trajectory(model, steps=steps):
        digits.sample(both, seed=SEED, n=DIGITS, steps=steps)
    records = moeca.stats(model).steps
    full = statistics.median(both.full_ms)
    names = Counter(one.variant for one in records)
    shares = {
        name: statistics.median(one.ms + one.overhead_ms for one in records if one.variant == name) / full
        for name in names
    }
    return shares, names
