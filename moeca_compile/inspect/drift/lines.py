"""What a calibration measured, as lines of a heat map: drift by step, and by expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

GAPS = (1, 2, 4, 8)  # how old the outputs are that stand in for a step's own


def by_step(
    steps: int, pairs: Mapping[tuple[int, int], int], parts: Any, groups: Sequence[str]
) -> dict[str, list[float]]:
    """How far the latent is moved where outputs of some steps before stand in: a line for each gap, and each group.

    Args:
        pairs: (a, s) -> a row of `parts`: the outputs of step a at step s.
        parts: [groups, pairs, samples, numbers]; what each group of regions moves, projected.
        groups: names of the groups.

    Returns:
        By name one root mean square a step; nan where it wasn't measured.
    """
    lines = {f"all regions, {gap} old": _norms(steps, pairs, parts.sum(axis=0), gap) for gap in GAPS}
    if len(groups) > 1:
        lines |= {f"{name}, 1 old": _norms(steps, pairs, part, 1) for name, part in zip(groups, parts, strict=True)}
    return {name: line for name, line in lines.items() if not all(np.isnan(line))}


def _norms(steps: int, pairs: Mapping[tuple[int, int], int], part: Any, gap: int) -> list[float]:
    size = np.sqrt(np.square(part).sum(axis=-1).mean(axis=-1))
    return [float(size[pairs[s - gap, s]]) if (s - gap, s) in pairs else float("nan") for s in range(steps)]


def by_expert(experts: Iterable[Mapping[str, Any]], what: str = "forecast") -> dict[str, list[float]]:
    """A line for each MoE layer, a column for each expert: the drift of its gated output, relative; `load` too."""
    lines: dict[str, list[float]] = {}
    for expert in experts:
        lines.setdefault(str(expert["region"]), []).append(float(expert[what]))
    return lines


def by_harm(trials: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """A line for each MoE layer, a column for each expert: the samples' mean PSNR with it stale; nan: not tried."""
    tried: dict[str, dict[int, list[float]]] = {}
    for trial in trials:
        of_region = tried.setdefault(str(trial["region"]), {})
        of_region.setdefault(int(trial["expert"]), []).append(float(trial["psnr_db"]))
    lines: dict[str, list[float]] = {}
    for region, experts in tried.items():
        columns = range(1 + max(experts))
        lines[region] = [fmean(experts[expert]) if expert in experts else float("nan") for expert in columns]
    return lines
