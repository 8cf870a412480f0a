"""Contenders at equal measured latency: each one's upper hull of quality over time, and what was promised of moeca."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.hull import hull_of, on_hull

Point = Mapping[str, Any]
Hull = list[tuple[float, float]]

REGIONS, OUTPUT = "moeca, fitted regions", "moeca, output fitted to uncached"
SOLVER = "moeca, output fitted to converged"  # its samples are not those of the uncached run

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
    "moeca fitted output, uncached": OUTPUT,
    "moeca fitted output, converged": SOLVER,
    "moeca fitted regions": REGIONS,
    "moeca calibrated, on onnxruntime": "moeca, calibrated, on onnxruntime",
    "moeca calibrated, one span": "moeca, calibrated, one span",
    "moeca calibrated": "moeca, calibrated",
}
ELSEWHERE = (", eager", ", compiled as a whole", ", never a hit")  # families of other tables
OTHER_ENGINE = "moeca, calibrated, on onnxruntime"  # shown, but not held against torch's programs
SPEEDUPS = (1.5, 2.0, 2.5, 2.93, 3.5, 4.0, 5.0)
RANGE = tuple(1.5 + 0.05 * step for step in range(71))  # where the margin is promised
MARGIN_DB = 2.0


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


def hulls(
    points: Iterable[Point], against: str = "uncached", cost: str = "time", figure: str = "psnr_db"
) -> dict[str, Hull]:
    """By group: (time over the baseline's, or "macs" over the uncached run's; PSNR in dB), by rising cost.

    figure: "psnr_db", the mean, or "psnr_db_worst", that of the worst 5 %.
    """
    found: dict[str, list[tuple[float, float]]] = {group: [] for group in GROUPS.values()}
    for point in points:
        group = group_of(point["family"])
        if group is not None and point["macs"] < 1:  # what computes everything is exact, and mixes with nothing
            found[group].append((1 / point["speedup"] if cost == "time" else point["macs"], point[against][figure]))
    return {group: hull_of(some) for group, some in found.items() if some}


def at(hull: Hull, speedup: float) -> float | None:
    """The best PSNR in no more time than that; None if no setting is as fast."""
    cost = 1 / speedup
    if cost < hull[0][0]:
        return None
    return max(y for _, y in hull) if cost >= hull[-1][0] else on_hull(hull, cost)


def is_peer(group: str) -> bool:
    return not group.startswith(("moeca", "random"))


def tried(points: Iterable[Point]) -> Counter[str]:
    """By group, how many settings were measured."""
    groups = [group_of(point["family"]) for point in points if point["macs"] < 1]
    return Counter(group for group in groups if group is not None)


def ours(found: Mapping[str, Hull]) -> list[str]:
    """The groups of moeca that are held against the others, each by itself."""
    return [group for group in found if group.startswith("moeca") and group != OTHER_ENGINE]


def best_peer(found: Mapping[str, Hull], speedup: float) -> tuple[str, float] | None:
    """The peer that is ahead at a speedup, and its PSNR."""
    peers = {group: at(hull, speedup) for group, hull in found.items() if is_peer(group)}
    levels = {group: level for group, level in peers.items() if level is not None}
    return max(levels.items(), key=lambda item: item[1]) if levels else None


def lead(found: Mapping[str, Hull], group: str, speedup: float) -> float | None:
    """How far one group is ahead of the best peer, in dB; None where it, or every peer, has nothing as fast."""
    level, other = at(found[group], speedup), best_peer(found, speedup)
    return None if level is None or other is None else level - other[1]


def judge(points: Sequence[Point]) -> list[Target]:
    """One line for each family of moeca: there is no best of several. Each is held to its own truth."""
    found = {truth: hulls(points, truth) for truth in ("uncached", "converged")}
    settings, peers = tried(points), [group for group in found["uncached"] if is_peer(group)]
    against = f"against {len(peers)} families of peers with {sum(settings[group] for group in peers)} settings"
    lines = []
    for group in ours(found["uncached"]):
        truth = truth_of(group)
        to = ", to the converged solution" if truth == "converged" else ""
        lines.append(_ahead(found[truth], group, f"{group}{to} ({settings[group]} settings), {against}"))
    return lines


def truth_of(group: str) -> str:
    """What a group of moeca is judged by."""
    return "converged" if group == SOLVER else "uncached"


def _ahead(found: Mapping[str, Hull], group: str, name: str) -> Target:
    levels = {speedup: lead(found, group, speedup) for speedup in RANGE}
    known = {speedup: level for speedup, level in levels.items() if level is not None}
    if not known:
        return Target(name, f"nothing as fast as {RANGE[0]:g}x", False)
    least = min(known, key=lambda speedup: known[speedup])
    good = [speedup for speedup, level in known.items() if level >= MARGIN_DB]
    measured = f"least {known[least]:+.1f} dB, at {least:.2f}x"
    if good and len(good) < len(levels):
        measured += f"; {MARGIN_DB:g} dB or more at {_ranges(good)}"
    if len(known) < len(levels):
        measured += f"; nothing as fast as {min(set(levels) - set(known)):.2f}x"
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
