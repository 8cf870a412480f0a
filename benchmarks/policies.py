"""Which parts to recompute: policies for the steps between full ones, at equal cost, on two trained digits models.

    python -m benchmarks.policies --calibrate   # examples/schedules/dsmoe_*.json, about 5 minutes
    python -m benchmarks.policies               # about 30 minutes on one core; goes on from results/policies.json
    python -m benchmarks.policies --report      # docs/branch-caching.md's tables and picture from the results

A schedule of whole regions says which steps are full, and a policy what happens at the others. MACs are counted on the
programs that ran, PSNR is against the uncached run, the mean over 32 digits that no search saw. `gain` is over the best
schedule of whole regions at the same MACs: the upper hull of all uniform and calibrated ones that were run.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import moeca_compile as moeca
from benchmarks.protocol import RESULTS, pin_threads, save
from examples import digits, dsmoe
from moeca_compile.adaptive import Adaptive
from moeca_compile.schedule import Act, Action, Control, Partial, Row, Schedule

SCHEDULES = Path("examples/schedules")
SEED, IMAGES, STEPS, BLOCKS = 5000, 32, 50, 6
MODELS: dict[str, Callable[[], Any]] = {"dit_moe": digits.load_model, "dsmoe": dsmoe.load_digits}
PREFIX = {"dit_moe": "digits", "dsmoe": "dsmoe"}
BUDGETS = {"50": 0.5033, "34": 0.3443}
C, F = Action.COMPUTE, Action.FORECAST
KEYS = tuple(f"blocks.{i}.{part}" for i in range(BLOCKS) for part in ("attn", "moe"))
WHOLE = "whole regions"
MANY = "uniform:4"  # the schedule on which all policies and ideas are tried

# What a step between full ones does with attention and experts.
POLICIES: dict[str, tuple[Act, Act]] = {
    WHOLE: (F, F),
    "branches forecast, none computed": (F, Partial(0, 0)),
    "transitions: tau 0.02": (F, Partial(0, 0.02)),
    "transitions: tau 0.04": (F, Partial(0, 0.04)),
    "branches: tau 0.1": (F, Partial(0, 0.1)),
    "tokens, attention too: rho 0.1": (Partial(0.1), Partial(0.1)),
    "tokens and branches: rho 0.1, tau 0.04": (Partial(0.1, 0.04), Partial(0.1, 0.04)),
    "attention tokens only: rho 0.25": (Partial(0.25), F),
    "attention every step, experts whole": (C, F),
    "attention every step, tau 0.04": (C, Partial(0, 0.04)),
}
# Further ideas.
IDEAS: dict[str, tuple[tuple[Act, Act], Control]] = {
    "tau 0.04, scored by drift of the router": ((F, Partial(0, 0.04)), Control("drift")),
    "tau 0.1, scored by drift of the router": ((F, Partial(0, 0.1)), Control("drift")),
    "tau 0.04 and shared experts computed": ((F, Partial(0, 0.04, True)), Control()),
}


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


@cache
def prepared(model: str) -> Any:
    network = MODELS[model]()
    moeca.prepare(network)
    return network


@cache
def uncached(model: str) -> Tensor:
    return digits.sample(MODELS[model](), seed=SEED, n=IMAGES, steps=STEPS)


def run(model: str, name: str, policy: str, schedule: Schedule) -> Point:
    torch._dynamo.reset()
    compiled = moeca.compile(prepared(model), schedule=schedule, inner="eager")
    with moeca.trajectory(compiled, steps=STEPS):
        images = digits.sample(compiled, seed=SEED, n=IMAGES, steps=STEPS)
    stats = moeca.stats(compiled)
    quality = float(digits.psnr(images, uncached(model)).mean())
    right = digits.accuracy(images, digits.labels_of(IMAGES))
    return Point(model, name, policy, stats.mac_fraction, quality, right, stats.state_bytes / 1e6)


def bases(model: str) -> dict[str, Schedule]:
    """Schedules of whole regions: uniform ones, and those that were calibrated."""
    found = {f"uniform:{k}": uniform(k) for k in (2, 3, 4, 6)}
    for budget in BUDGETS:
        path = SCHEDULES / f"{PREFIX[model]}_{budget}.json"
        if path.exists():
            found[f"calibrated for {budget} %"] = Schedule.load(path)
    return found


def uniform(interval: int) -> Schedule:
    """Two full steps, then every `interval`-th; order 1."""
    rows = tuple((C if step < 2 or (step - 1) % interval == 0 else F,) * len(KEYS) for step in range(STEPS))
    return Schedule(rows, KEYS, order=1, made_by=f"uniform:{interval}")


def with_policy(schedule: Schedule, acts: tuple[Act, Act], control: Control | None = None) -> Schedule:
    """The schedule with `acts` at the steps that aren't full."""

    def row(old: Row) -> Row:
        return old if all(act is C for act in old) else acts * BLOCKS

    control = control or Control()
    return replace(schedule, rows=tuple(map(row, schedule.rows)), order=schedule.order or 1, control=control)


def adaptive(threshold: float, cheap: tuple[Act, Act]) -> Schedule:
    rows = (tuple([C] * len(KEYS)), cheap * BLOCKS)
    return Schedule(rows, KEYS, order=1, adaptive=Adaptive((threshold,)))


def jobs(model: str) -> list[tuple[str, str, Schedule]]:
    found = [(name, WHOLE, schedule) for name, schedule in bases(model).items()]
    chosen = [*(name for name in bases(model) if name.startswith("calibrated")), "uniform:2", "uniform:4"]
    few = [one for one in POLICIES if one != WHOLE and not one.startswith(("tokens", "attention"))]
    for name in chosen:
        policies = [policy for policy in (POLICIES if name == MANY else few) if policy != WHOLE]
        found += [(name, policy, with_policy(bases(model)[name], POLICIES[policy])) for policy in policies]
    found += [(MANY, idea, with_policy(bases(model)[MANY], *idea_of)) for idea, idea_of in IDEAS.items()]
    for threshold in (0.02, 0.05):
        found.append((f"adaptive:{threshold}", "adaptive, whole regions", adaptive(threshold, (F, F))))
        found.append((f"adaptive:{threshold}", "adaptive, tau 0.04", adaptive(threshold, (F, Partial(0, 0.04)))))
    return found


def with_gains(points: Sequence[Point]) -> list[Point]:
    """Each point's gain over the hull of the whole-region schedules, where its MACs lie within it."""
    result = []
    for point in points:
        hull = hull_of([(one.macs, one.psnr_db) for one in points if one.model == point.model and one.policy == WHOLE])
        level = on_hull(hull, point.macs)
        result.append(replace(point, gain_db=None if level is None else point.psnr_db - level))
    return result


def hull_of(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper concave hull, by rising cost."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        while len(hull) > 1 and _turn(hull[-2], hull[-1], (x, y)) >= 0:
            hull.pop()
        hull.append((x, y))
    return hull


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def on_hull(hull: Sequence[tuple[float, float]], macs: float) -> float | None:
    """The hull's height at `macs`; None outside it."""
    for (x0, y0), (x1, y1) in itertools.pairwise(hull):
        if x0 <= macs <= x1:
            return y0 + (y1 - y0) * (macs - x0) / (x1 - x0)
    return None


def calibrate() -> None:
    """Schedules of whole regions for the second model, as `examples.03_calibrate` makes the first one's."""
    sampler = import_module("examples.03_calibrate").sampler()
    for name, share in BUDGETS.items():
        found = moeca.calibrate(
            dsmoe.load_digits(), sampler, budget=f"macs:{share}", granularity="region", seeds=range(8),
            holdout=range(1000, 1002), data_range=2.0, resume=Path("build/dsmoe"),
        )  # fmt: skip
        found.save(SCHEDULES / f"dsmoe_{name}.json")
        print(f"{name} %: {found.predicted}")


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

    figure, panels = plt.subplots(1, len(MODELS), figsize=(11, 4.6), sharey=True)
    for axes, model in zip(panels, MODELS, strict=True):
        mine = [one for one in points if one.model == model]
        hull = hull_of([(one.macs, one.psnr_db) for one in mine if one.policy == WHOLE])
        axes.plot([100 * x for x, _ in hull], [y for _, y in hull], color="0.6", zorder=0)
        for number, policy in enumerate(dict.fromkeys(one.policy for one in mine)):
            some = [one for one in mine if one.policy == policy]
            marker, colour = "osD^vP*X<>"[number % 10], f"C{number % 10}"
            axes.scatter(
                [100 * one.macs for one in some], [one.psnr_db for one in some], s=22, marker=marker, color=colour,
                label=policy,
            )  # fmt: skip
        axes.set(title=model, xlabel="% of the MACs", xlim=(15, 65))
    panels[0].set_ylabel("PSNR against uncached, dB")
    panels[-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare what is recomputed between full steps.")
    parser.add_argument("--calibrate", action="store_true", help="make the second model's schedules and stop")
    parser.add_argument("--report", action="store_true", help="print and draw what results/policies.json holds")
    parser.add_argument("--quick", action="store_true", help="two runs, nothing kept: does it run?")
    parser.add_argument("--model", choices=[*MODELS], help="only this one's runs")
    parser.add_argument(
        "--fresh", action="store_true", help="forget what results/policies.json holds, not go on from it"
    )
    args = parser.parse_args(argv)
    pin_threads()
    if args.calibrate:
        calibrate()
        return
    wanted = [args.model] if args.model else [*MODELS]
    points = [] if args.fresh or args.quick else kept()
    done = {(one.model, one.schedule, one.policy) for one in points}
    todo = [(model, *job) for model in wanted for job in jobs(model)]
    missing = [job for job in todo if job[:3] not in done]
    for job in track([] if args.report else missing[:2] if args.quick else missing, description="policies"):
        points.append(run(*job))
        if not args.quick:
            keep(points)
    points = with_gains(points)
    for model in MODELS:
        Console(width=120).print(table(points, model))
    if not args.quick:
        keep(points)
        picture(points, Path("docs/policies.svg"))


def kept() -> list[Point]:
    """What runs before this one found."""
    file = RESULTS / "policies.json"
    return [Point(**one) for one in json.loads(file.read_text())["points"]] if file.exists() else []


def keep(points: Sequence[Point]) -> None:
    save("policies", {"images": IMAGES, "steps": STEPS, "points": [asdict(one) for one in points]})


if __name__ == "__main__":
    main()
