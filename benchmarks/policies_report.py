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
    time_share: float | None = None
    gain_in_time_db: float | None = None


def with_gains(points: Sequence[Point]) -> list[Point]:
    """Each point's gain over the hull of the whole-region schedules, where its MACs lie within it."""
    models = {one.model for one in points}
    macs, time = ({model: whole_regions(points, model, cost) for model in models} for cost in ("macs", "time_share"))
    return [
        replace(
            one,
            gain_db=_gain(macs[one.model], one, one.macs),
            gain_in_time_db=_gain(time[one.model], one, one.time_share),
        )
        for one in points
    ]


def _gain(hull: list[tuple[float, float]], point: Point, cost: float | None) -> float | None:
    level = None if cost is None else on_hull(hull, cost)
    return None if level is None else point.psnr_db - level


def whole_regions(points: Sequence[Point], model: str, cost: str = "macs") -> list[tuple[float, float]]:
    """The hull of a model's schedules of whole regions."""
    mine = [one for one in points if one.model == model and one.policy == WHOLE]
    return hull_of([(share, one.psnr_db) for one in mine if (share := getattr(one, cost)) is not None])


def table(points: Sequence[Point], model: str) -> Table:
    shown = Table(title=model, title_justify="left")
    for name in ("schedule", "policy", "MACs", "PSNR dB", "gain dB", "time", "gain in time", "state MB"):
        shown.add_column(name)
    for one in points:
        if one.model == model:
            gains = (one.gain_db, one.gain_in_time_db)
            by_macs, in_time = ("" if g is None or one.policy == WHOLE else f"{g:+.2f}" for g in gains)
            time = "" if one.time_share is None else f"{one.time_share:.1%}"
            quality = f"{one.psnr_db:.1f}"
            shown.add_row(
                one.schedule, one.policy, f"{one.macs:.1%}", quality, by_macs, time, in_time, f"{one.state_mb:.0f}"
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
