"""What a calibration kept in its folder, as lines and points for the report's page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moeca_compile.errors import ScheduleError
from moeca_compile.inspect.drift.lines import by_step
from moeca_compile.inspect.html.measured import Measured
from moeca_compile.inspect.report import Report
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import row_kinds
from moeca_compile.planner.store import Store, without_mark


def measurements(folder: str | Path, report: Report) -> Measured:
    """Read what a calibration of the model measured, for the plots of `Report.to_html`.

    Args:
        folder: the `resume` folder of `moeca_compile.calibrate`.
        report: of `moeca_compile.explain` for the same model and granularity.

    Returns:
        The drift of each step, and a point for each schedule that was sampled: its fraction of the MACs, and its mean
        PSNR in dB on the seeds that it ran on. The fraction counts the MACs of regions that a row computes, and all
        MACs outside the regions.

    Raises:
        ScheduleError: the folder holds no calibration of this granularity and graph, or is damaged.
    """
    granularity = report.schedule.granularity or "region"
    place = Path(folder) / granularity.replace(":", "_")
    if not (place / "facts.json").exists():
        raise ScheduleError(
            f"{str(folder)!r} holds no calibration for granularity {granularity!r}: calibrate(..., "
            f"granularity={granularity!r}, resume={str(folder)!r}) makes one"
        )
    store = Store(place)
    store.check({"graph": report.fingerprint, "granularity": granularity})
    drift = stored_drift(store)
    return Measured(drift[0] if drift is not None else {}, _front(store, report))


def stored_drift(store: Store) -> tuple[dict[str, list[float]], Mapping[str, Any]] | None:
    """How far the latent moves where older outputs stand in, by step.

    Returns:
        By name one number a step, for all regions together and for each group of regions that was displaced by itself
        (a group is named after its columns); and what else was measured with it, the drift of each expert. None: no
        drift is stored.

    Raises:
        ScheduleError: a file is damaged.
    """
    stored = store.drift()
    if stored is None:
        return None
    total, extra = stored
    split = store.drift(name="split")
    lines: dict[str, list[float]] = {}
    for drift in (split[0], total) if split is not None else (total,):  # the lines of all regions are those of `total`
        groups = [f"regions {', '.join(map(str, columns))}" for columns in drift.atoms]
        lines |= by_step(drift.steps, drift.pairs, drift.parts, groups)
    return lines, extra


def _front(store: Store, report: Report) -> dict[str, list[tuple[float, float]]]:
    """For each predictor the schedules that were rolled out."""
    kinds = row_kinds([region.kind for region in report.regions], [region.layer for region in report.regions])
    shares = [region.macs / report.full_macs if report.full_macs else 0.0 for region in report.regions]
    costs = {
        letter: 1.0 - sum(share for share, cell in zip(shares, cells, strict=True) if cell is None)
        for letter, cells in kinds.items()
    }
    errors: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for (plan, _), (samples, _) in store.rollouts.items():
        if set(plan.letters) <= costs.keys():
            errors.setdefault((plan.predictor, plan.letters), []).append(samples)
    data_range = _data_range(store) if errors else 1.0
    front: dict[str, list[tuple[float, float]]] = {}
    for (predictor, letters), of_seeds in errors.items():
        cost = sum(costs[letter] for letter in letters) / len(letters)
        front.setdefault(without_mark(predictor), []).append((cost, mean_psnr(of_seeds, data_range)))
    return front


def _data_range(store: Store) -> float:
    """Of the uncached samples, as the calibration takes it by default."""
    assert store.path is not None
    bounds = []
    for file in sorted((store.path / "truth").glob("[0-9]*.npy")):
        samples = store.truth(int(file.name.partition(".")[0]))
        if samples is not None:
            bounds.append((float(samples.min()), float(samples.max())))
    lows, highs = np.array(bounds or [(0.0, 1.0)]).T
    return float(highs.max() - lows.min()) or 1.0
