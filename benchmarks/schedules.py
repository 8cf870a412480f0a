"""What a calibrated schedule is worth: against uniform ones and fewer steps at equal MACs, on the digits model.

    python -m benchmarks.schedules            # 50, 20 and 10 steps; writes results/schedules.json
    python -m benchmarks.schedules --quick    # 10 steps, few seeds: does it run?
    python -m benchmarks.schedules --again calibrated sweep    # only these parts; figures of the rest are kept
    python -m benchmarks.schedules --picture docs/pareto.svg    # error against cost, drawn from results/schedules.json

All contenders make the same images: Euler steps of a rectified flow with guidance 2, from the same noise. A budget is
what the uniform schedule of that interval costs, by the package's own count of MACs; for a solver with fewer steps it
is as many whole steps as fit. Finished work is kept in `--work`, so that a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moeca_compile as moeca
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, GUIDANCE
from examples import digits
from examples.frechet import features_of, frechet
from moeca_compile.inspect import plots
from moeca_compile.planner.rollout import SampledModel
from moeca_compile.planner.search.drift import Drift
from moeca_compile.planner.search.predict import ORDERS
from moeca_compile.planner.search.rows import Plan, row_of, uniform_letters
from moeca_compile.planner.store import Store
from moeca_compile.schedule import Action, Schedule

WORK = Path("build/schedules")
CONVERGED = 100  # second-order steps: the reference for "how far from the exact solution"
LEADING_SEEDS = 8  # uniform schedules are compared on so many held-out seeds, the best then on all
PARTS = ("calibrated", "rest", "sweep")  # of a run: the contender itself, the others, every uniform for the picture
SWEEP = range(2, 11)  # intervals of the uniform schedules in the picture, each with all orders, on `LEADING_SEEDS`


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    steps: tuple[int, ...]
    images: int  # a seed
    seeds: int  # that the search sees
    held_out: int
    intervals: dict[int, tuple[int, ...]]  # by steps: the uniform schedules whose cost is the budget


WHOLE = Size((50, 20, 10), 4, 16, 64, {50: (2, 3, 4, 5), 20: (2, 3, 4), 10: (2, 3)})
QUICK = Size((10,), 2, 2, 2, {10: (2,)})


@dataclass(frozen=True)
class Line:
    """One contender: decibels are means over the images."""

    name: str
    what: str
    mac_fraction: float
    psnr_db: float
    psnr_db_converged: float
    accuracy: float
    frechet: float


labels_of, sampler = DIGITS.labels_of, DIGITS.sampler


class Bench:
    """The model, and everything that was sampled with it."""

    def __init__(self, size: Size, work: Path) -> None:
        self.size, self.work = size, work
        self.model = digits.load_model()
        self.solver = sampler(size.images, 1)
        self.sampled = SampledModel(self.model, lambda model, seed: self.solver(model, seed), "region", "inductor")
        self.seeds = tuple(range(size.seeds))
        self.held_out = tuple(range(10_000, 10_000 + size.held_out))
        (work / "images").mkdir(parents=True, exist_ok=True)
        self.sampled.run(0)  # a step, to capture the graph

    def images(self, steps: int, plan: Plan | None = None, second_order: bool = False, seeds: int = 0) -> Tensor:
        """The images of the first so many (0: all) held-out seeds, made now or before."""
        self.solver = sampler(self.size.images, steps, second_order)
        made = []
        for seed in self.held_out[: seeds or None]:
            key = hashlib.sha256(f"{steps} {plan} {second_order} {seed} {self.size.images}".encode()).hexdigest()[:24]
            file = self.work / "images" / f"{key}.npy"
            if not file.exists():
                np.save(file, self.sampled.run(seed, plan).numpy())
            made.append(torch.from_numpy(np.load(file)))
        return torch.cat(made)

    def psnr(self, images: Tensor, truth: Tensor) -> float:
        return digits.psnr(images, truth[: len(images)]).clamp(max=150).mean().item()

    def line(self, name: str, what: str, cost: float, images: Tensor, truth: Tensor, exact: Tensor) -> Line:
        labels = torch.cat([labels_of(seed, self.size.images) for seed in self.held_out])
        return Line(
            name, what, cost, self.psnr(images, truth), self.psnr(images, exact),
            digits.accuracy(images, labels), distance(images, truth),
        )  # fmt: skip

    # -- contenders -------------------------------------------------------------------------------------------------

    def calibrated(self, steps: int, budget: float) -> Schedule:
        return moeca.calibrate(
            self.model,
            sampler(self.size.images, steps),
            budget=f"macs:{math.ceil(budget * 1e4) / 1e4:.4f}",
            granularity="region",
            seeds=self.seeds,
            holdout=0,
            data_range=2.0,
            resume=self.work / f"steps{steps}",
        )

    def uniform(self, steps: int, budget: float, order: int, truth: Tensor, drift: Drift | None) -> tuple[Plan, str]:
        """The best uniform schedule of an order: every interval and warm-up ranked by estimate, then by sampling."""
        fits = {}
        for interval in range(2, steps + 1):
            for warmup in range(1, steps):
                plan = Plan(uniform_letters(steps, interval, warmup), ORDERS[order].name)
                if self.cost(plan) <= budget + 1e-6:
                    fits.setdefault(plan, f"uniform:{interval}:warmup={warmup}")
        kinds = self.sampled.kinds
        known = sorted(fits, key=lambda plan: -drift.quality(plan, kinds) if drift else -self.cost(plan))
        shown = {
            plan: self.psnr(self.images(steps, plan, seeds=LEADING_SEEDS), truth) for plan in known[: 4 if order else 2]
        }
        best = max(shown, key=lambda plan: shown[plan])
        return best, fits[best]

    def plan_of(self, schedule: Schedule) -> Plan:
        """A calibrated schedule's rows as letters again."""
        letters = {row_of(cells, schedule.order): letter for letter, cells in self.sampled.kinds.items()}
        return Plan("".join(letters[row] for row in schedule.rows), f"order-{schedule.order}")

    def cost(self, plan: Plan) -> float:
        return sum(self.macs[letter] for letter in plan.letters) / len(plan.letters)

    @property
    def macs(self) -> dict[str, float]:
        """Of a computed and of a forecast step, relative to a computed one."""
        program = self.sampled.program
        computed, forecast = (
            program.variant((action,) * len(program.regions)).macs for action in (Action.COMPUTE, Action.FORECAST)
        )
        return {"C": 1.0, "F": forecast / computed}


def distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the two sets of images (N,1,16,16) in the features of the digits' judge."""
    judge = digits.load_classifier()
    return frechet(features_of(judge, a), features_of(judge, b))


def measure(bench: Bench, steps: int, again: Sequence[str], kept: dict[str, Any], console: Console) -> dict[str, Any]:
    """At one number of steps: the parts of `again` now, the others as `kept` has them."""
    found = dict(kept)
    if {"calibrated", "rest"} & set(again):
        found |= budgets(bench, steps, "rest" in again, kept.get("budgets", {}), console)
    if "sweep" in again:
        console.print(f"{steps} steps: every uniform schedule", style="dim")
        found["sweep"] = sweep(bench, steps)
    return found


def budgets(bench: Bench, steps: int, rest: bool, kept: dict[str, Any], console: Console) -> dict[str, Any]:
    """All contenders at all budgets; those beside the calibrated schedule from `kept` unless `rest`."""
    console.print(f"{steps} steps: uncached and converged", style="dim")
    truth, exact = bench.images(steps), bench.images(CONVERGED, second_order=True)
    reference = bench.line("uncached", f"{steps} steps", 1.0, truth, truth, exact)
    tables = {}
    for interval in bench.size.intervals[steps]:
        ruler = Plan(uniform_letters(steps, interval, 1), "order-1")
        budget = bench.cost(ruler)
        key = f"{budget:.3f}"
        console.print(f"{steps} steps, {budget:.1%}: calibrating", style="dim")
        schedule = bench.calibrated(steps, budget)
        console.print(f"{steps} steps, {budget:.1%}: contenders", style="dim")
        if rest:
            lines = others(bench, steps, ruler, truth, exact)
        else:
            lines = [Line(**line) for line in kept[key]["lines"] if line["name"] != "calibrated"]
        plan, cost = bench.plan_of(schedule), schedule.predicted["mac_fraction"]
        made = bench.images(steps, plan)
        lines.append(bench.line("calibrated", f"order {schedule.order}", cost, made, truth, exact))
        tables[key] = {
            "lines": [asdict(line) for line in lines],
            "schedule": plan.letters,
            "predicted": dict(schedule.predicted),
            "made_by": schedule.made_by,
        }
        show(f"{steps} steps, {budget:.1%} of the MACs", [reference, *lines], console)
    return {"uncached": asdict(reference), "budgets": tables}


def others(bench: Bench, steps: int, ruler: Plan, truth: Tensor, exact: Tensor) -> list[Line]:
    """What a calibrated schedule is held against, at the cost of `ruler`."""
    kept, lines = Store(bench.work / f"steps{steps}" / "region").drift(), []
    for order in range(3):
        plan, name = bench.uniform(steps, bench.cost(ruler), order, truth, None if kept is None else kept[0])
        made = bench.images(steps, plan)
        lines.append(bench.line(f"best uniform, order {order}", name, bench.cost(plan), made, truth, exact))
    fewer = ruler.letters.count("C")
    for second, name in ((False, "fewer Euler steps"), (True, "fewer second-order steps")):
        made = bench.images(fewer, second_order=second)
        lines.append(bench.line(name, f"{fewer} steps", fewer / steps, made, truth, exact))
    return lines


def sweep(bench: Bench, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Of every uniform schedule without warm-up: share of the MACs and PSNR on `LEADING_SEEDS`, by order."""
    truth = bench.images(steps, seeds=LEADING_SEEDS)
    found: dict[str, list[tuple[float, float]]] = {}
    for order in ORDERS:
        for interval in SWEEP:
            plan = Plan(uniform_letters(steps, interval, 1), order.name)
            psnr = bench.psnr(bench.images(steps, plan, seeds=LEADING_SEEDS), truth)
            found.setdefault(f"every uniform, {order.name}", []).append((round(bench.cost(plan), 5), round(psnr, 3)))
    return found


def draw(results: Path, picture: Path) -> None:
    """Error against cost, from what a run wrote; of the most steps."""
    found = json.loads(results.read_text())["steps"]
    steps = max(found, key=int)
    series: dict[str, list[tuple[float, float]]] = {}
    for table in found[steps]["budgets"].values():
        for line in table["lines"]:
            series.setdefault(line["name"], []).append((line["mac_fraction"], line["psnr_db"]))
    dots = found[steps].get("sweep", {})
    title = f"digits model, {steps} steps"
    plots.save(plots.pareto(series, "share of the MACs", "PSNR to the uncached samples, dB", dots, title), picture)


def show(title: str, lines: Sequence[Line], console: Console) -> None:
    table = Table("contender", "", title=title, title_justify="left")
    for column in ("MACs", "PSNR dB", "to converged", "accuracy", "Fréchet"):
        table.add_column(column, justify="right")
    for one in lines:
        psnr = "" if one.name == "uncached" else f"{one.psnr_db:.1f}"
        figures = (f"{one.mac_fraction:.1%}", psnr, f"{one.psnr_db_converged:.1f}")
        table.add_row(one.name, one.what, *figures, f"{one.accuracy:.1%}", f"{one.frechet:.4f}")
    console.print(table)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Calibrated schedules against uniform ones and fewer steps.", "10 steps, few seeds")
    parser.add_argument("--steps", type=int, nargs="*", help="only these numbers of steps")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder of what is done (default {WORK})")
    parser.add_argument("--again", nargs="*", choices=PARTS, help="only these parts, the others as the result has them")
    parser.add_argument("--picture", type=Path, help="draw the result into this .svg or .png, and measure nothing")
    args = parser.parse_args(argv)
    out = folder_of(args)
    written = (out or RESULTS) / "schedules.json"
    if args.picture is not None:
        draw(written, args.picture)
        return
    again = PARTS if args.again is None else args.again
    kept = {} if args.again is None else json.loads(written.read_text())["steps"]
    size = QUICK if args.quick else WHOLE
    pin_threads()
    console = Console()
    bench = Bench(size, args.work)
    found = kept | {
        str(steps): measure(bench, steps, again, kept.get(str(steps), {}), console)
        for steps in args.steps or size.steps
    }
    if out:
        payload = {
            "model": f"digits, CFG {GUIDANCE:g}, {size.images} images a seed, {size.seeds} seeds for the search, "
            f"{size.held_out} held out; converged: {CONVERGED} second-order steps",
            "measured anew": list(again),
            "steps": found,
        }
        print(f"written: {save('schedules', payload, out).name}")


if __name__ == "__main__":
    main()
