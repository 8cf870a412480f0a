"""What `benchmarks.policies` shows: each run, its gain over whole regions at equal cost, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from benchmarks.hull import hull_of, on_hull

WHOLE = "whole regions"


@dataclass(frozen=True)
class Point:
    """One run."""

    model: str
    schedule: str
    policy: str
    macs: float
    psnr_db: float
    accuracy: float
    state_mb: float
    gain_db: float | None = None


def with_gains(points: Sequence[Point]) -> list[Point]:
    """Each point's gain over the hull of the whole-region schedules, where its MACs lie within it."""
    hulls = {model: whole_regions(points, model) for model in {one.model for one in points}}
    result = []
    for point in points:
        level = on_hull(hulls[point.model], point.macs)
        result.append(replace(point, gain_db=None if level is None else point.psnr_db - level))
    return result


def whole_regions(points: Sequence[Point], model: str) -> list[tuple[float, float]]:
    """The hull of a model's schedules of whole regions."""
    return hull_of([(one.macs, one.psnr_db) for one in points if one.model == model and one.policy == WHOLE])


def table(points: Sequence[Point], model: str) -> Table:
    shown = Table("schedule", "policy", "MACs", "PSNR dB", "gain dB", "state MB", title=model, title_justify="left")
    for one in points:
        if one.model == model:
            gain = "" if one.gain_db is None or one.policy == WHOLE else f"{one.gain_db:+.2f}"
            shown.add_row(
                one.schedule, one.policy, f"{one.macs:.1%}", f"{one.psnr_db:.1f}", gain, f"{one.state_mb:.0f}"
            )
    return shown


def picture(points: Sequence[Point], path: Path) -> None:
    """PSNR against MACs, the hull of whole regions and every policy, one panel a model."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    models = tuple(dict.fromkeys(one.model for one in points))
    figure, panels = plt.subplots(1, len(models), figsize=(11, 4.6), sharey=True, squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        mine = [one for one in points if one.model == model]
        hull = whole_regions(points, model)
        axes.plot([100 * x for x, _ in hull], [y for _, y in hull], color="0.6", zorder=0)
        for number, policy in enumerate(dict.fromkeys(one.policy for one in mine)):
            some = [one for one in mine if one.policy == policy]
            marker, colour = "osD^vP*X<>"[number % 10], f"C{number % 10}"
            axes.scatter(
                [100 * one.macs for one in some], [one.psnr_db for one in some], s=22, marker=marker, color=colour,
                label=policy,
            )  # fmt: skip
        axes.set(title=model, xlabel="% of the MACs", xlim=(15, 65))
    panels[0][0].set_ylabel("PSNR against uncached, dB")
    panels[0][-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(path)
