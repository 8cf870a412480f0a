"""Contenders at equal measured latency: each one's upper hull of quality over time, and what was promised of moeca."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.hull import hull_of, on_hull

Point = Mapping[str, Any]
Hull = list[tuple[float, float]]

# What a family counts as, by how its name begins; the first that fits. Others are in no comparison.
GROUPS = {
    "fewer steps, Euler": "fewer steps, Euler",
    "fewer steps, Adams": "fewer steps, second order",
    "fewer steps, DPM": "fewer steps, second order",
    "FORA": "FORA-like copy",
    "TaylorSeer": "TaylorSeer (diffusers)",
    "DBCache static mask": "cache-dit, static masks",
    "DBCache": "cache-dit, DBCache",
    "TeaCache": "TeaCache-like",
    "random": "random full steps, order 1 (best of the draws)",
    "moeca uniform": "moeca, uniform",
    "moeca adaptive": "moeca, adaptive",
    "moeca by branches": "moeca, by branches",
    "moeca calibrated, on onnxruntime": "moeca, calibrated, on onnxruntime",
    "moeca calibrated, one span": "moeca, calibrated, one span",
    "moeca calibrated": "moeca, calibrated",
}
ELSEWHERE = (", eager", ", compiled as a whole", ", never a hit")  # families of other tables
OTHER_ENGINE = "moeca, calibrated, on onnxruntime"  # shown, but not held against torch's programs
SPEEDUPS = (1.5, 2.0, 2.5, 2.93, 3.5, 4.0, 5.0)
RANGE = tuple(1.5 + 0.05 * step for step in range(71))  # where the margin is promised
MARGIN_DB = 2.0
PAPER, PAPER_DB, PAPER_ACCURACY = 2.93, 45.0, 0.005


@dataclass(frozen=True)
class Target:
    """One line of the verdict."""

    name: str
    measured: str
    met: bool


def points_of(payload: Mapping[str, Any]) -> list[Point]:
    return [point for heat in payload["heats"].values() for point in heat["points"]]


def group_of(family: str) -> str | None:
    if family.endswith(ELSEWHERE):
        return None
    return next((group for start, group in GROUPS.items() if family.startswith(start)), None)


def hulls(points: Iterable[Point], against: str = "uncached", cost: str = "time") -> dict[str, Hull]:
    """By group: (time over the baseline's, or "macs" over the uncached run's; PSNR in dB), by rising cost."""
    found: dict[str, list[tuple[float, float]]] = {group: [] for group in GROUPS.values()}
    for point in points:
        group = group_of(point["family"])
        if group is not None and point["macs"] < 1:  # what computes everything is exact, and mixes with nothing
            found[group].append((1 / point["speedup"] if cost == "time" else point["macs"], point[against]["psnr_db"]))
    return {group: hull_of(some) for group, some in found.items() if some}


def at(hull: Hull, speedup: float) -> float | None:
    """The best PSNR in no more time than that; None if no setting is as fast."""
    cost = 1 / speedup
    if cost < hull[0][0]:
        return None
    return max(y for _, y in hull) if cost >= hull[-1][0] else on_hull(hull, cost)


def is_peer(group: str) -> bool:
    return not group.startswith(("moeca", "random"))


def best(found: Mapping[str, Hull], speedup: float, peers: bool) -> tuple[str, float] | None:
    """The group that is ahead at a speedup, and its PSNR."""
    levels = {
        group: level
        for group, hull in found.items()
        if (is_peer(group) if peers else group.startswith("moeca") and group != OTHER_ENGINE)
        and (level := at(hull, speedup)) is not None
    }
    return max(levels.items(), key=lambda item: item[1]) if levels else None


def margins(found: Mapping[str, Hull], speedups: Sequence[float] = RANGE) -> dict[float, float | None]:
    """How far moeca is ahead of the best peer, in dB; None where moeca has nothing as fast."""
    result: dict[float, float | None] = {}
    for speedup in speedups:
        own, other = best(found, speedup, peers=False), best(found, speedup, peers=True)
        result[speedup] = None if own is None or other is None else own[1] - other[1]
    return result


def judge(points: Sequence[Point]) -> list[Target]:
    found = hulls(points)
    return [_ahead(found), _paper(points, found)]


def _ahead(found: Mapping[str, Hull]) -> Target:
    levels = margins(found)
    known = {speedup: level for speedup, level in levels.items() if level is not None}
    missing = [speedup for speedup, level in levels.items() if level is None]
    least = min(known, key=lambda speedup: known[speedup])
    good = [speedup for speedup, level in known.items() if level >= MARGIN_DB]
    measured = f"least {known[least]:+.1f} dB, at {least:.2f}x"
    if good and len(good) < len(levels):
        measured += f"; {MARGIN_DB:g} dB or more at {_ranges(good)}"
    if missing:
        measured += f"; nothing as fast as {min(missing):.2f}x"
    name = f"at equal measured latency >= {MARGIN_DB:g} dB above the best peer at every speedup from 1.5x to 5x"
    return Target(name, measured, len(good) == len(levels))


def _ranges(speedups: Sequence[float]) -> str:
    """1.50x to 2.20x, 2.40x: neighbours of the grid run together."""
    step = RANGE[1] - RANGE[0]
    runs: list[list[float]] = []
    for speedup in speedups:
        if runs and speedup - runs[-1][-1] < 1.5 * step:
            runs[-1].append(speedup)
        else:
            runs.append([speedup])
    return ", ".join(f"{run[0]:.2f}x to {run[-1]:.2f}x" if len(run) > 1 else f"{run[0]:.2f}x" for run in runs)


def _paper(points: Sequence[Point], found: Mapping[str, Hull]) -> Target:
    own = best(found, PAPER, peers=False)
    uncached = next(point for point in points if point["family"] == "eager, as shipped")["class_accuracy"]
    # A mixture of two settings is as accurate as its worse one.
    near = [] if own is None else _around([point for point in points if group_of(point["family"]) == own[0]], PAPER)
    lost = max((uncached - point["class_accuracy"] for point in near), default=1.0)
    level = None if own is None else own[1]
    measured = "nothing as fast" if level is None else f"{level:.1f} dB, {100 * lost:.1f} points of accuracy lost"
    name = f"at {PAPER}x at least {PAPER_DB:g} dB and class accuracy within 0.5 point of uncached"
    return Target(name, measured, level is not None and level >= PAPER_DB and lost <= PAPER_ACCURACY)


def _around(points: Sequence[Point], speedup: float) -> list[Point]:
    """The nearest settings that are faster, and slower."""
    faster = [point for point in points if point["speedup"] >= speedup]
    slower = [point for point in points if point["speedup"] < speedup]
    return [
        *([min(faster, key=lambda point: point["speedup"])] if faster else []),
        *([max(slower, key=lambda point: point["speedup"])] if slower else []),
    ]
