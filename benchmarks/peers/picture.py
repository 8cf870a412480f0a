"""The picture: PSNR against measured speedup, to both truths, one line a contender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.verdict import Point, group_of, hulls, is_peer


def draw(points: Sequence[Point], path: Path) -> None:
    """Every setting as a mark, each contender's hull as a line; moeca's thick."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "peers"}):  # the same file from the same results
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), sharex=True)
        _panel(left, points, "uncached", "PSNR to the uncached digits, dB", (25, 70))
        _panel(right, points, "converged", "PSNR to the converged solution, dB", (30, 60))
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _panel(axes: Any, points: Sequence[Point], truth: str, label: str, limits: tuple[float, float]) -> None:
    for number, (group, hull) in enumerate(hulls(points, truth).items()):
        some = [point for point in points if group_of(point["family"]) == group]
        own = group.startswith("moeca")
        colour, marker = f"C{number % 10}", "osD^vP*X<>hpd"[number % 13]
        style = "-" if own else "--" if is_peer(group) else ":"
        axes.plot([1 / x for x, _ in hull], [y for _, y in hull], style, color=colour, linewidth=2.2 if own else 1)
        xs, ys = [point["speedup"] for point in some], [point[truth]["psnr_db"] for point in some]
        axes.scatter(xs, ys, s=26 if own else 14, marker=marker, color=colour, label=group)
    speedup = "measured speedup over torch.compile of the prepared model"
    axes.set(xlabel=speedup, ylabel=label, xscale="log", xlim=(1, 7.5), ylim=limits)
    ticks = [1, 1.5, 2, 3, 4, 5, 6, 7]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
