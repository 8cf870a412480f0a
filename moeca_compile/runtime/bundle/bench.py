"""How fast a bundle is here: each variant, and whole trajectories with and without the cache."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeca_compile.runtime.bundle.feeds import Arrays
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.stats import Stats

WARM_UP = 4  # steps


@dataclass(frozen=True)
class Figures:
    """Milliseconds are medians. `full_ms`, `cached_ms`: of a trajectory; `speedup`: the median over the rounds."""

    provider: str
    steps: int
    batch: int
    rounds: int
    variant_ms: dict[str, float]
    full_ms: float
    cached_ms: float
    speedup: float
    mac_fraction: float


def bench_bundle(session: Session, steps: int = 50, rounds: int = 3, batch: int = 2) -> Figures:
    """Time `rounds` trajectories, and as many with every step computed. They take turns step by step, so that a slow
    spell of the machine meets both. Inputs are the golden ones, repeated."""
    inputs = _inputs(session, batch)
    every: dict[str, list[float]] = defaultdict(list)
    cached, full = [], []
    _run(session, inputs, min(steps, WARM_UP))  # the first run of a variant allocates
    for _ in range(rounds):
        fast, slow, stats = _run(session, inputs, steps)
        cached.append(fast)
        full.append(slow)
        for record in stats.steps:
            every[record.variant].append(record.ms)
    return Figures(
        provider=session.provider,
        steps=steps,
        batch=batch,
        rounds=rounds,
        variant_ms={name: statistics.median(ms) for name, ms in sorted(every.items())},
        full_ms=statistics.median(full),
        cached_ms=statistics.median(cached),
        speedup=statistics.median(slow / fast for slow, fast in zip(full, cached, strict=True)),
        mac_fraction=stats.mac_fraction,
    )


def _run(session: Session, inputs: Arrays, steps: int) -> tuple[float, float, Stats]:
    """Milliseconds of a cached trajectory and of a full one."""
    cached = full = 0.0
    with session.trajectory() as trajectory:
        for step in range(steps):
            feeds = _at(session, inputs, step)
            begin = time.perf_counter()
            trajectory.run(feeds)
            middle = time.perf_counter()
            session.run(feeds)
            cached += middle - begin
            full += time.perf_counter() - middle
        return cached * 1e3, full * 1e3, trajectory.stats()


def _inputs(session: Session, batch: int) -> Arrays:
    first = session.bundle.golden()[0][0]
    return {spec.name: _spread(first[spec.name], spec.sizes(batch)) for spec in session.inputs}


def _spread(array: Any, sizes: tuple[int, ...]) -> Any:
    return np.resize(array, sizes).astype(array.dtype)


def _at(session: Session, inputs: Arrays, step: int) -> Arrays:
    """Where rows are chosen by timestep, the step's own."""
    name, times = session.manifest.timestep, session.schedule.timesteps
    if not times or name is None:
        return inputs
    return {**inputs, name: np.full_like(inputs[name], times[min(step, len(times) - 1)])}
