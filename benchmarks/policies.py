"""Which parts to recompute: policies for the steps between full ones, at equal cost, on two trained digits models.

    python -m benchmarks.policies --calibrate   # the schedules in examples/schedules, about 5 minutes each
    python -m benchmarks.policies               # about 30 minutes on one core; goes on from results/policies.json
    python -m benchmarks.policies --report      # docs/branch-caching.md's tables and picture from the results

A schedule of whole regions says which steps are full, and a policy what happens at the others. MACs are counted on the
programs that ran, PSNR is against the uncached run, the mean over 32 digits that no search saw. `gain` is over the best
schedule of whole regions at the same MACs: the upper hull of all uniform and calibrated ones that were run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import moeca_compile as moeca
from benchmarks.policies_report import WHOLE, Point, picture, table, with_gains
from benchmarks.protocol import RESULTS, pin_threads, save
from examples import digits, dsmoe
from moeca_compile.adaptive import Adaptive
from moeca_compile.schedule import Act, Action, Control, Partial, Row, Schedule

SCHEDULES = Path("examples/schedules")
SEED, IMAGES, STEPS, BLOCKS = 5000, 32, 50, 6
MODELS: dict[str, Callable[[], Any]] = {"dit_moe": digits.load_model, "dsmoe": dsmoe.load_digits}
PREFIX = {"dit_moe": "digits", "dsmoe": "dsmoe"}
BUDGETS = {"52": 0.5178, "50": 0.5033, "34": 0.3443}
C, F = Action.COMPUTE, Action.FORECAST
KEYS = tuple(f"blocks.{i}.{part}" for i in range(BLOCKS) for part in ("attn", "moe"))
TAU = 0.04
CALIBRATED = f"calibrated with tau {TAU} in every cheap row"
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
        path = SCHEDULES / file_of(model, budget, 0.0)
        if path.exists():
            found[f"calibrated for {budget} %"] = Schedule.load(path)
    return found


def uniform(interval: int) -> Schedule:
    """Two full steps, then every `interval`-th; order 1."""
    rows = tuple((C if step < 2 or (step - 1) % interval == 0 else F,) * len(KEYS) for step in range(STEPS))
    return Schedule(rows, KEYS, order=1, made_by=f"uniform:{interval}")


def with_policy(schedule: Schedule, acts: tuple[Act, Act], control: Control | None = None) -> Schedule:
    """The schedule with `acts` in the place of whole regions forecast."""

    def row(old: Row) -> Row:
        return tuple(new if act is F else act for act, new in zip(old, acts * BLOCKS, strict=True))

    control = control or Control()
    return replace(schedule, rows=tuple(map(row, schedule.rows)), order=schedule.order or 1, control=control)


def adaptive(threshold: float, cheap: tuple[Act, Act]) -> Schedule:
    rows = (tuple([C] * len(KEYS)), cheap * BLOCKS)
    return Schedule(rows, KEYS, order=1, adaptive=Adaptive((threshold,)))


def jobs(model: str) -> list[tuple[str, str, Schedule]]:
    found = [(name, WHOLE, schedule) for name, schedule in bases(model).items()]
    for budget in BUDGETS:
        path = SCHEDULES / file_of(model, budget, TAU)
        if path.exists():
            found.append((f"calibrated for {budget} %", CALIBRATED, Schedule.load(path)))
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


def calibrate(models: Sequence[str]) -> None:
    """Schedules of both kinds on the same seeds: of whole regions, and with branches where these are better.

    The first model's of whole regions are `examples.03_calibrate`'s.
    """
    sampler = import_module("examples.03_calibrate").sampler()
    for model, (name, share), branches in product(models, BUDGETS.items(), (0.0, TAU)):
        if model == "dit_moe" and not branches:
            continue
        torch._dynamo.reset()
        found = moeca.calibrate(
            MODELS[model](), sampler, budget=f"macs:{share}", granularity="region", seeds=range(8),
            holdout=range(1000, 1002), data_range=2.0, branches=branches, resume=Path("build") / model, inner="eager",
        )  # fmt: skip
        if not branches or any(found.partials(column) for column in range(len(KEYS))):
            found.save(SCHEDULES / file_of(model, name, branches))
        print(f"{model} {name} %: {found.made_by}: {found.predicted['psnr_db']:.2f} dB")


def file_of(model: str, budget: str, branches: float) -> str:
    return f"{PREFIX[model]}_{budget}{'_branches' if branches else ''}.json"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare what is recomputed between full steps.")
    parser.add_argument("--calibrate", action="store_true", help="make the schedules and stop")
    parser.add_argument("--report", action="store_true", help="print and draw what results/policies.json holds")
    parser.add_argument("--quick", action="store_true", help="two runs, nothing kept: does it run?")
    parser.add_argument("--model", choices=[*MODELS], help="only this one's runs")
    parser.add_argument(
        "--fresh", action="store_true", help="forget what results/policies.json holds, not go on from it"
    )
    args = parser.parse_args(argv)
    pin_threads()
    wanted = [args.model] if args.model else [*MODELS]
    if args.calibrate:
        calibrate(wanted)
        return
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
