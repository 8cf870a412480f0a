"""Measure one heat: a few families and the baseline, compiled one after the other, then timed in turns.

The trajectories that are timed are those whose images tell quality. Compile seconds are what the first trajectory took
longer than the later ones; they are kept where the family started with Inductor's caches on disk empty. Once compiled,
contenders are timed without Dynamo's guards wherever that can't change what they do; their first images say that it
didn't.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from benchmarks.peers import plain
from benchmarks.peers.memory import peak_bytes
from benchmarks.peers.way import Family, Foretold, Way
from benchmarks.peers.workload import Batch, Truth, Workload, relative_l2

# As cache-dit's documentation recommends; at 8 the contenders that recompile would fall back to eager.
RECOMPILES, ALL_RECOMPILES = 1024, 8192

SAME = 1e-3  # relative L2: hoisted values are rounded otherwise once the timesteps are known
SPACING = 6  # settings between two runs of the baseline

Say = Callable[[str], None]


class Clock(NamedTuple):
    """Seconds on the wall, and of this process alone: others' load is in the first and hardly in the second."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.wall - other.wall, self.cpu - other.cpu)


@dataclass
class Lane:
    """One setting while its heat runs."""

    family: Family
    setting: str
    way: Way
    first_seconds: float = 0.0
    first: Tensor | None = None  # images of the first trajectory
    told: int | None = None  # bytes of state, before the first trajectory
    images: list[Tensor] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    clocks: list[Clock] = field(default_factory=list)
    speedups: list[Clock] = field(default_factory=list)  # over the baseline around it, by round

    def run(self, batch: Batch, keep: bool = True) -> Clock:
        with torch.compiler.set_stance(skip_guard_eval_unsafe=not self.family.guarded):
            started = Clock.now()
            images = self.way.sample(batch)
            took = Clock.now() - started
        self.clocks.append(took)
        if keep:
            self.images.append(images)
            self.macs.append(self.way.macs())
        return took


def heat(families: Sequence[Family], work: Workload, truth: Truth, say: Say) -> dict[str, Any]:
    """The points of the families' settings, and what compiling each family showed."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = RECOMPILES
    torch._dynamo.config.accumulated_recompile_limit = ALL_RECOMPILES
    load = os.getloadavg()[0]
    # where there is one heat, no later one finds the baseline's code on disk
    first = Family(plain.BASELINE, "plain", "one graph", lambda work: {}, cold=work.speed_only)
    base = Lane(first, "", plain.baseline(work))
    compiling = {plain.BASELINE: first_runs([base], truth.batches[0])}
    lanes: list[Lane] = []
    for family in families:
        say(f"{family.name}: compiling")
        opened = [Lane(family, name, way) for name, way in family.open(work).items()]
        compiling[family.name] = first_runs(opened, truth.batches[0])
        lanes += opened
    base.way.sample(truth.batches[0])  # contenders compile code that its model shares: what was dropped comes back
    say(f"timing {len(lanes)} settings, {work.size.rounds} rounds")
    timed(base, lanes, truth.batches)
    lanes.insert(0, base)
    peaks = {lane.family.name: peak_of(lane.way, truth.batches[0]) for lane in reversed(lanes)}  # of the first setting
    points = [point(lane, work, truth) for lane in lanes]
    found = {
        name: {**facts, "peak_bytes": peaks[name], "note": note_of(lanes, name)} for name, facts in compiling.items()
    }
    return {"load_1min": [round(load, 2), round(os.getloadavg()[0], 2)], "families": found, "points": points}


def first_runs(lanes: Sequence[Lane], batch: Batch) -> dict[str, int]:
    """The first trajectory of each setting, which compiles; Dynamo's graphs and graph breaks in it."""
    for lane in lanes:
        if isinstance(lane.way, Foretold):
            lane.told = lane.way.told_bytes()
    counters.clear()
    with fresh_cache() if lanes[0].family.cold else nullcontext():
        for lane in lanes:
            started = time.perf_counter()
            lane.first = lane.way.sample(batch)
            lane.first_seconds = time.perf_counter() - started
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}


def timed(base: Lane, lanes: Sequence[Lane], batches: Sequence[Batch]) -> None:
    """One round a batch, all settings in turn, and the baseline before, after and after every `SPACING` of them.

    A setting's speedup in a round is over the mean of the baseline's runs on both sides: minutes may lie between the
    two ends of a round, and the machine isn't the same there.
    """
    groups = [lanes[start : start + SPACING] for start in range(0, len(lanes), SPACING)]
    gc.collect()
    gc.disable()
    try:
        for batch in batches:
            before = base.run(batch)
            for group in groups:
                for lane in group:
                    lane.run(batch)
                    check(lane)
                after = base.run(batch, keep=False)
                for lane in group:
                    own = lane.clocks[-1]
                    around = (before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2
                    lane.speedups.append(Clock(around[0] / own.wall, around[1] / own.cpu))
                before = after
            base.speedups.append(Clock(1.0, 1.0))
            gc.collect()
    finally:
        gc.enable()


def check(lane: Lane) -> None:
    """Of its first timed trajectory.

    Raises:
        RuntimeError: it gave other images than the first of all, which ran under guards.
    """
    if lane.first is None or len(lane.images) != 1:
        return
    if (off := relative_l2(lane.images[0], lane.first)) > SAME:
        raise RuntimeError(f"{lane.family.name}, {lane.setting}: other images without guards, relative L2 {off:.2g}")


def peak_of(way: Way, batch: Batch) -> int | None:
    way.forget()
    return peak_bytes(lambda: way.sample(batch))


def point(lane: Lane, work: Workload, truth: Truth) -> dict[str, Any]:
    """All figures of one setting."""
    seconds = [clock.wall for clock in lane.clocks]
    typical = statistics.median(seconds)
    return {
        "family": lane.family.name,
        "side": lane.family.side,
        "setting": lane.setting,
        "seconds": round(typical, 4),
        "seconds_min": round(min(seconds), 4),
        "seconds_max": round(max(seconds), 4),
        "speedup": round(statistics.median(one.wall for one in lane.speedups), 4),
        "speedup_by_round": [round(one.wall, 3) for one in lane.speedups],
        "speedup_of_processor_time": round(statistics.median(one.cpu for one in lane.speedups), 4),
        "macs": round(statistics.mean(lane.macs), 5),
        "state_bytes": lane.way.state_bytes(),
        "compile_seconds": round(max(0.0, lane.first_seconds - typical), 2) if lane.family.cold else None,
        **told(lane),
        **work.figures(torch.cat(lane.images), truth),
    }


def told(lane: Lane) -> dict[str, int]:
    """The state that was told before the first trajectory, where it was.

    Raises:
        RuntimeError: the last trajectory kept another number of bytes.
    """
    if lane.told is None or not isinstance(lane.way, Foretold):
        return {}
    if lane.told != (held := lane.way.held_bytes()):
        name = f"{lane.family.name}, {lane.setting}"
        raise RuntimeError(f"{name}: {lane.told} bytes of state were told, the trajectory kept {held}")
    return {"told_bytes": lane.told}


def note_of(lanes: Sequence[Lane], name: str) -> str:
    return next(lane.family.note for lane in lanes if lane.family.name == name)
