"""The tables of the pages, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from benchmarks.pages import markdown
from benchmarks.peers import plain, roster
from benchmarks.peers.verdict import (
    OUTPUT,
    REGIONS,
    SOLVER,
    SPEEDUPS,
    Hull,
    Point,
    at,
    best_peer,
    group_of,
    hulls,
    lead,
    ours,
    tried,
    truth_of,
)

SHORT = (
    "fewer steps, second order", "TaylorSeer (diffusers)", "cache-dit, DBCache", "TeaCache-like", "moeca, uniform",
    REGIONS, OUTPUT, SOLVER,
)  # fmt: skip
TOLD = (REGIONS, OUTPUT, SOLVER)  # families whose margins are explained, each by itself
TO_TRUTH = {"uncached": OUTPUT, "converged": SOLVER}  # what is fitted to it
NEVER, EAGER, AS_A_WHOLE = ", never a hit", ", eager", ", compiled as a whole"
UNCACHED, RECOMPILED = "eager, as shipped", "the baseline, compiled anew"


def equal_latency(points: Sequence[Point], against: str = "uncached", figure: str = "psnr_db") -> str:
    """PSNR of each contender at the same measured speedups, and each of moeca's families less the best peer."""
    found, settings = hulls(points, against, figure=figure), tried(points)
    head = ["", "settings", *(f"{speedup:g}x" for speedup in SPEEDUPS)]
    rows = [
        [group, str(settings[group]), *(_db(at(hull, speedup)) for speedup in SPEEDUPS)]
        for group, hull in found.items()
    ]
    rows += [
        [f"**{group}, less the best peer**", "", *(_signed(lead(found, group, speedup)) for speedup in SPEEDUPS)]
        for group in ours(found)
    ]
    return markdown(head, rows)


def both_truths(points: Sequence[Point], speedups: Sequence[float] = (1.5, 2.0, 2.93, 4.0, 5.0)) -> str:
    """Some contenders at the same measured speedups: PSNR to the uncached samples / to the converged solution.

    Raises:
        ValueError: one of them wasn't measured.
    """
    _check_measured(points)
    truths = {truth: hulls(points, truth) for truth in TO_TRUTH}
    head = ["", *(f"{speedup:g}x" for speedup in speedups)]
    rows = [
        [group, *(" / ".join(_db(at(found[group], speedup)) for found in truths.values()) for speedup in speedups)]
        for group in SHORT
    ]
    margins = [
        " / ".join(_signed(lead(truths[truth], group, one)) for truth, group in TO_TRUTH.items()) for one in speedups
    ]
    rows.append(["**moeca, output fitted to each truth, less the best peer**", *margins])
    return markdown(head, rows).replace("- / -", "-")


def causes(points: Sequence[Point]) -> list[str]:
    """Where the margin goes: at equal MACs, and what each contender makes of its MACs.

    Raises:
        ValueError: a contender of the README wasn't measured.
    """
    _check_measured(points)
    lines = []
    for group, (title, cost) in product(TOLD, (("measured latency", "time"), ("MACs", "macs"))):
        truth = truth_of(group)
        leads = _leads(hulls(points, truth, cost), group)
        lines.append(f"At equal {title}, to the {truth} samples, {group}, less the best peer, in dB: {leads}.")
    fastest: dict[str, Point] = {}
    for point in sorted(points, key=lambda point: point["speedup"]):
        group = group_of(point["family"])
        if group is not None:
            fastest[group] = point
    told = ", ".join(f"{group} {_beyond_macs(point):.1%}" for group, point in fastest.items())
    lines.append(
        "What a cheap step takes beyond its MACs, as a share of a full one's time, at each contender's fastest "
        f"setting: {told}. Where moeca is less ahead in time than at equal MACs, this is what it lacks."
    )
    return lines


def _check_measured(points: Sequence[Point]) -> None:
    found = hulls(points)
    if missing := [group for group in SHORT if group not in found]:
        raise ValueError(f"{'; '.join(missing)}: not measured yet. Run python -m benchmarks.peers")


def _leads(found: Mapping[str, Hull], group: str) -> str:
    told = []
    for speedup in SPEEDUPS:
        peer = best_peer(found, speedup)
        told.append(f"{_signed(lead(found, group, speedup))} at {speedup:g}x" + (f" ({peer[0]})" if peer else ""))
    return ", ".join(told)


def _beyond_macs(point: Point) -> float:
    return (1 / point["speedup"] - point["macs"]) / (1 - point["macs"])


def uncached_from_converged(points: Sequence[Point]) -> str:
    return _db(next(point for point in points if point["family"] == UNCACHED)["converged"]["psnr_db"])


def shipped_of(points: Sequence[Point]) -> float | None:
    """How fast the compiled model as shipped is, over the baseline."""
    found = [point["speedup"] for point in points if point["family"] == plain.SHIPPED]
    return found[0] if found else None


def compile_and_cache(points: Sequence[Point]) -> str:
    """Rows: what is cached; columns: how it is compiled."""

    def speedup(family: str, setting: str = "") -> float | None:
        found = [one["speedup"] for one in points if (one["family"], one["setting"]) == (family, setting)]
        return found[0] if found else None

    interval, threshold = f"N={roster.PAIR}", f"{roster.PAIR_THRESHOLD:g}"
    names = {
        f"TaylorSeer, order 1, {interval}": ("TaylorSeer (diffusers), order 1", interval),
        f"DBCache F1B0, {threshold}": ("DBCache F1B0 W8", threshold),
        f"moeca, calibrated for {roster.PAIR_BUDGET} %": ("moeca calibrated", f"{roster.PAIR_BUDGET} %"),
    }
    rows = [
        ["as shipped, nothing cached", _times(speedup(UNCACHED)), _times(speedup(plain.SHIPPED)), "-"],
        ["prepared, nothing cached", _times(speedup("eager, prepared")), _times(speedup(RECOMPILED)), "-"],
        ["moeca, everything computed", "-", _times(speedup("moeca, everything computed")), "-"],
    ]
    for title, (family, setting) in names.items():
        ways = (family + EAGER, family, family + AS_A_WHOLE)
        rows.append([title, *(_times(speedup(way, setting)) for way in ways)])
    return markdown(["", "eager", "compiled", "compiled as a whole, with breaks"], rows)


def families(heats: Mapping[str, Any]) -> str:
    rows = []
    for heat in heats.values():
        for name, facts in heat["families"].items():
            own = [point for point in heat["points"] if point["family"] == name]
            if name == plain.BASELINE or name.endswith(NEVER):
                continue
            seconds = own[0]["compile_seconds"]
            rows.append(
                [
                    name,
                    f"{len(own)}",
                    f"{facts['graphs']}",
                    f"{facts['graph_breaks']}",
                    "-" if seconds is None else f"{seconds:.1f}",
                    f"{own[0]['state_bytes'] / 1e6:.2f}",
                    "-" if facts["peak_bytes"] is None else f"{facts['peak_bytes'] / 1e6:.1f}",
                ]
            )
    return markdown(["", "settings", "graphs", "breaks", "compile seconds", "state MB", "peak MB"], rows)


def never_a_hit(points: Sequence[Point]) -> str:
    rows = [
        [
            point["family"].removesuffix(NEVER),
            f"{point['macs']:.1%}",
            f"{1 / point['speedup'] - 1:+.1%}",
            spread(point),
            _db(point["uncached"]["psnr_db"]),
        ]
        for point in points
        if point["family"].endswith(NEVER)
    ]
    return markdown(["", "MACs", "time over the baseline", "speedup, by round", "PSNR dB"], rows)


def settings(points: Sequence[Point], shipped: float | None) -> str:
    """One line a setting, in the order of measuring; the baseline of each heat once."""
    rows, seen = [], set()
    for point in points:
        key = (point["family"], point["setting"])
        if key in seen or point["family"].endswith(NEVER):
            continue
        seen.add(key)
        near, exact = point["uncached"], point["converged"]
        rows.append(
            [
                f"{point['family']}{', ' if point['setting'] else ''}{point['setting']}",
                f"{point['seconds']:.2f}",
                f"{point['speedup']:.2f} ({spread(point)})",
                "-" if shipped is None else f"{point['speedup'] / shipped:.2f}",
                f"{point['macs']:.1%}",
                _db(near["psnr_db"]),
                _db(near["psnr_db_worst"]),
                _db(exact["psnr_db"]),
                f"{near['relative_l2']:.2g}",
                f"{near['ssim']:.4f}",
                f"{point['frechet']:.3f}",
                f"{point['state_bytes'] / 1e6:.2f}",
            ]
        )
    head = [
        "", "seconds", "speedup (by round)", "over shipped", "MACs", "PSNR dB", "worst 5 %", "to converged",
        "rel. L2", "SSIM", "Fréchet", "state MB",
    ]  # fmt: skip
    return (
        "*over shipped*: over `torch.compile` of the model as shipped, by the measured ratio of the two baselines.\n\n"
        + markdown(head, rows)
    )


def notes(heats: Mapping[str, Any]) -> list[str]:
    """What each contender's documentation says, and how it is run here."""
    told = {name: facts["note"] for heat in heats.values() for name, facts in heat["families"].items()}
    return [f"{name}: {note}." for name, note in told.items() if not name.endswith(NEVER)]


def _db(level: float | None) -> str:
    return "-" if level is None else f"{level:.1f}"


def _times(speedup: float | None) -> str:
    return "-" if speedup is None else f"{speedup:.2f}"


def spread(point: Point) -> str:
    return f"{min(point['speedup_by_round']):.2f} to {max(point['speedup_by_round']):.2f}"


def _signed(level: float | None) -> str:
    return "-" if level is None else f"{level:+.1f}"
