"""Which parts to recompute: policies for the steps between full ones, at equal cost, on two trained digits models.

    python -m benchmarks.policies --calibrate   # the schedules in examples/schedules, about 5 minutes each
    python -m benchmarks.policies               # about 30 minutes on one core; goes on from results/policies.json
    python -m benchmarks.policies --latency     # then what each schedule costs in time, about 30 minutes
    python -m benchmarks.policies --report      # docs/branch-caching.md's tables and picture from the results

A schedule of whole regions says which steps are full, and a policy what happens at the others. MACs are counted on the
programs that ran, PSNR is against the uncached run, the mean over 32 digits that no search saw. `gain` is over the best
schedule of whole regions at the same MACs, or in the same time: the upper hull of all uniform and calibrated ones that
were run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
from benchmarks.policies_jobs import BUDGETS, KEYS, MODELS, SCHEDULES, STEPS, TAU, file_of, jobs
from benchmarks.policies_latency import time_share
from benchmarks.policies_report import Point, picture, table, with_gains
from benchmarks.protocol import RESULTS, pin_threads, save
from examples import digits
from moeca_compile.schedule import Schedule

SEED, IMAGES = 5000, 32


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
        for what, quality in found.predicted.items():
            if what.startswith("tried branches, "):
                print(f"    {what}: {quality:.2f} dB")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare what is recomputed between full steps.")
    parser.add_argument("--calibrate", action="store_true", help="make the schedules and stop")
    parser.add_argument("--report", action="store_true", help="print and draw what results/policies.json holds")
    parser.add_argument("--latency", action="store_true", help="time some of what was run, compiled")
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
    looks = args.report or args.latency  # at what was run before
    todo = [] if looks else [(model, *job) for model in wanted for job in jobs(model)]
    missing = [job for job in todo if job[:3] not in done]
    for job in track(missing[:2] if args.quick else missing, description="policies"):
        points.append(run(*job))
        if not args.quick:
            keep(points)
    if args.latency:
        points = timed(points, not args.quick)
    points = with_gains(points)
    for model in MODELS:
        Console(width=120).print(table(points, model))
    if not args.quick:
        keep(points)
        picture(points, Path("docs/policies.svg"))


def timed(points: list[Point], keeps: bool) -> list[Point]:
    """The points with their share of the time, where they have none yet."""
    schedules = {(model, name, policy): schedule for model in MODELS for name, policy, schedule in jobs(model)}
    for number, one in enumerate(track(points, description="latency")):
        if one.time_share is None:
            schedule = schedules[one.model, one.schedule, one.policy]
            points[number] = replace(one, time_share=time_share(prepared(one.model), schedule, STEPS))
            if keeps:
                keep(points)
    return points


def kept() -> list[Point]:
    """What runs before this one found."""
    file = RESULTS / "policies.json"
    return [Point(**one) for one in json.loads(file.read_text())["points"]] if file.exists() else []


def keep(points: Sequence[Point]) -> None:
    save("policies", {"images": IMAGES, "steps": STEPS, "points": [asdict(one) for one in points]})


if __name__ == "__main__":
    main()
