"""The data that the HTML page shows: dictionaries, lists, texts and finite numbers. `docs/how-to/report-page.md` lists
the entries. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moeca_compile.graph.regions import Indivisible, Region
from moeca_compile.inspect.actions import does
from moeca_compile.inspect.html.graphs import interned
from moeca_compile.inspect.html.measured import Measured, tried
from moeca_compile.inspect.routing import attending, routing
from moeca_compile.schedule import Act, Action, Schedule
from moeca_compile.schedule.action import legend_of, name_of

if TYPE_CHECKING:
    from moeca_compile.inspect.report import Report

FORMAT, VERSION = "moeca-report", 1
OPEN_ENDED_STEPS = 50  # shown of a schedule that repeats, where no trajectory says how many there are
_KINDS: dict[Act, str] = {Action.COMPUTE: "compute", Action.REUSE: "reuse", Action.FORECAST: "forecast"}


def page_data(
    report: Report,
    *,
    pairs: Sequence[tuple[str, str]] = (),
    measured: Measured | None = None,
    others: Sequence[Schedule] = (),
    steps: int | None = None,
) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        report: of `explain`.
        pairs: of images, uncached and cached, as data URIs.
        measured: by the calibration that made the schedule.
        others: schedules of the same model, for the front.
        steps: how many steps to show; default: those of the last trajectory, else those of the schedule.

    Returns:
        The data; `json.dumps(..., allow_nan=False)` takes it.
    """
    rows = report.schedule.distinct_rows()
    acts: list[Act] = [*_KINDS, *legend_of(rows).values()]
    shares = {variant.name: _share(variant.macs, report.full_macs) for variant in report.variants}
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": _model(report),
        "schedule": _schedule(report),
        "actions": [_action(act, report.regions) for act in acts],
        "regions": [_region(region, report.full_macs) for region in report.regions],
        "rows": [[acts.index(act) for act in row] for row in rows],
        "variants": [{**asdict(variant), "share": shares[variant.name]} for variant in report.variants],
        "steps": _steps(report, steps),
        "rejected": [asdict(rejected) for rejected in report.rejected],
        "hoisted": [asdict(value) for value in report.hoisted],
        "passes": [dict(zip(("name", "ms", "before", "after"), record, strict=True)) for record in report.passes],
        "graphs": interned(report.pass_graphs),
        "measured": _measured(report.schedule, measured or Measured(), others),
        "pairs": [{"uncached": uncached, "cached": cached} for uncached, cached in pairs],
    }


def _share(macs: int, total: int) -> float:
    return macs / total if total else 0.0


def _model(report: Report) -> dict[str, Any]:
    names = ("model", "graphs", "nodes", "total_macs", "fingerprint", "timestep", "latent", "state_bytes", "breaks")
    return {name: getattr(report, name) for name in names}


def _schedule(report: Report) -> dict[str, Any]:
    schedule, weights = report.schedule, report.output_weights
    names = ("made_by", "order", "granularity", "period")
    return {
        **{name: getattr(schedule, name) for name in names},
        "adaptive": schedule.adaptive is not None,
        "output_weights": None if weights is None else {**asdict(weights), "line": str(weights)},
        "rows": len(schedule.rows),
        "predicted": {name: value for name, value in schedule.predicted.items() if not name.startswith("tried ")},
    }


def _action(act: Act, regions: Sequence[Region]) -> dict[str, Any]:
    kinds = dict.fromkeys(region.kind for region in regions)
    by_kind = {kind: does(act, kind) for kind in kinds}
    return {"name": name_of(act).lower(), "kind": _KINDS.get(act, "partial"), "does": by_kind}


def _region(region: Region, total_macs: int) -> dict[str, Any]:
    routers = {experts.router for experts in region.experts if experts.router is not None}
    return {
        "key": region.key,
        "kind": region.kind,
        "layer": region.layer,
        "share": _share(region.macs, total_macs),
        "macs": region.macs,
        "state_bytes": region.state_bytes,
        "shapes": [list(shape) for shape in region.shapes],
        "dtypes": list(region.dtypes),
        "how": attending(region) or routing(region),
        "experts": max((router.num_experts for router in routers), default=0),
        "top_k": max((router.top_k for router in routers), default=0),
        "parameters": [name for name, _ in region.parameters],
        "whole_because": region.division.reason if isinstance(region.division, Indivisible) else "",
    }


def _steps(report: Report, steps: int | None) -> list[dict[str, Any]]:
    """What each step runs: as it ran where there was a trajectory, else as the schedule says."""
    schedule, rows = report.schedule, report.schedule.distinct_rows()
    calls: dict[int, list[Mapping[str, Any]]] = {}
    for call in report.calls:
        calls.setdefault(call["step"], []).append(call)
    if steps is None:
        is_open = bool(schedule.period) or schedule.adaptive is not None
        planned = max(OPEN_ENDED_STEPS, len(schedule.rows)) if is_open else len(schedule.rows)
        steps = max(calls) + 1 if calls else planned
    shown = []
    for step in range(steps):
        row = None
        if schedule.adaptive is None and (index := schedule.row_index(step)) is not None:
            row = rows.index(schedule.rows[index])
        ran = calls.get(step, [])
        timestep = schedule.timesteps[step] if step < len(schedule.timesteps) else None
        if ran:
            row = next((call["row"] for call in ran if call["row"] is not None), row)
            timestep = next((call["timestep"] for call in ran if call["timestep"] is not None), timestep)
        shown.append({"step": step, "timestep": timestep, "row": row, "calls": [dict(call) for call in ran]})
    return shown


def _measured(schedule: Schedule, measured: Measured, others: Sequence[Schedule]) -> dict[str, Any]:
    front = {name: [list(point) for point in points] for name, points in measured.front.items()}
    for name, schedules in (("other schedules", others), ("this schedule", (schedule,))):
        points = [point for each in schedules if (point := _point(each)) is not None]
        if points:
            front[name] = points
    drift = {name: [value if value == value else None for value in line] for name, line in measured.drift.items()}
    return {"drift": drift, "front": front, "tried": tried(schedule)}


def _point(schedule: Schedule) -> list[float] | None:
    """Share of the MACs and PSNR in dB, on held-out seeds where there were any; None: it wasn't calibrated."""
    predicted = schedule.predicted
    quality = predicted.get("psnr_db_holdout", predicted.get("psnr_db"))
    if quality is None or "mac_fraction" not in predicted:
        return None
    return [predicted["mac_fraction"], quality]
