"""What caching inside the network adds to forecasts of its output, at equal MACs: regions, attention, expert branches.

    python -m benchmarks.beyond_output                  # about 8 minutes on one core; writes results/beyond_output.json
    python -m benchmarks.beyond_output --task glyphs    # the glyphs model; writes results/beyond_output_glyphs.json
    python -m benchmarks.beyond_output --quick          # one interval, few samples: does it run?
    python -m benchmarks.beyond_output --report         # the table of docs/branch-caching.md

All compute the same steps in full: two, then every k-th. They differ in what the steps between compute and forecast. A
gain is over what output forecasts give for the same MACs, a mixture of the two nearest of them, sample by sample. Of
orders 1 and 2 the better one is told, and of fitted weights those of two or of three values. What was drawn stays in
`--work`, so that a stopped run goes on. No time is told.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import moeca_compile as moeca
from benchmarks import fitted
from benchmarks.hull import hull_of
from benchmarks.pages import write_held_out
from benchmarks.paired import interval, paired, psnr
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, TASKS, Task
from moeca_compile.planner.request import Request
from moeca_compile.planner.search.rows import Plan, schedule_of
from moeca_compile.planner.search.weights import fitted_forecasts
from moeca_compile.planner.study import Study
from moeca_compile.schedule import Act, Action, Partial, Row, Schedule
from moeca_compile.schedule.fitted import FittedWeights

WORK, PAGE = Path("build/beyond_output"), Path("docs/branch-caching.md")
STEPS, FIRST_SEED, BATCH = 50, 72_000, 32
INTERVALS = (2, 3, 4, 6)
C, F = Action.COMPUTE, Action.FORECAST
OUTPUT = "output forecast"
FITTED = "output, fitted weights"
CHEAP: dict[str, tuple[Act, Act]] = {  # attention, experts
    "attention and experts forecast": (F, F),
    "experts forecast, attention computed": (C, F),
    "attention forecast, 4 % of the expert branches computed": (F, Partial(0, 0.04)),
    "attention and 4 % of the expert branches computed": (C, Partial(0, 0.04)),
}
LETTERS = {"attention and experts forecast": "F", "experts forecast, attention computed": "A"}  # as the planner's
OF_REGIONS = {family: f"{family}, fitted weights" for family in LETTERS}
MARKS = {
    "digits": "<!-- python -m benchmarks.beyond_output --report -->",
    "glyphs": "<!-- python -m benchmarks.beyond_output --task glyphs --report -->",
}

Run = Mapping[str, Any]  # family, setting, macs, and psnr_db of each sample


def full(step: int, gap: int) -> bool:
    """Whether a step computes everything: the first two, then every `gap`-th."""
    return step < 2 or (step - 1) % gap == 0


def schedules(
    keys: Sequence[str], of_output: fitted.Bench, intervals: Sequence[int]
) -> dict[tuple[str, str], Schedule]:
    """By family and setting.

    Args:
        keys: of the model's regions, attention and experts in turn.
        of_output: fitted schedules; those that nobody calibrated are left out.
        intervals: between full steps.
    """
    found: dict[tuple[str, str], Schedule] = {}
    for gap in intervals:
        for order in (1, 2):
            rows: tuple[Row, ...] = tuple((C if full(step, gap) else F,) for step in range(STEPS))
            found[OUTPUT, f"every {gap}th, order {order}"] = Schedule(rows, order=order, granularity="output")
        for family, acts in CHEAP.items():
            blocks = len(keys) // 2
            rows = tuple(((C, C) if full(step, gap) else acts) * blocks for step in range(STEPS))
            for order in (1,) if isinstance(acts[1], Partial) else (1, 2):
                found[family, f"every {gap}th, order {order}"] = Schedule(rows, tuple(keys), order=order)
    for share in fitted.WHOLE.shares:
        if (path := of_output.known(share, fitted.UNCACHED)) is not None:
            found[FITTED, f"{share} %"] = Schedule.load(path)
    return found


def with_fitted_weights(
    task: Task, intervals: Sequence[int], seeds: int, samples: int
) -> dict[tuple[str, str], Schedule]:
    """The same steps with weights fitted to the regions' drift on seeds that aren't told, by family and setting."""
    request = Request.read("macs:0.5", "auto", 4, seeds, 0, None, 2.0, 2**30, None, 0, 0.0)
    study = Study(task.load(), task.sampler(samples, STEPS), "region", "eager", request, lambda text, share: None)
    study.sample_uncached()
    kinds, keys = study.sampled.kinds, study.sampled.program.regions.keys
    found: dict[tuple[str, str], Schedule] = {}
    for (family, letter), gap, order in itertools.product(LETTERS.items(), intervals, (1, 2)):
        letters = "".join("C" if full(step, gap) else letter for step in range(STEPS))
        plan, drift = Plan(letters, f"order-{order}"), study.drift if letter == "F" else study.split
        weights = None if drift is None else fitted_forecasts(drift, plan, kinds, most=order + 1)
        if weights is not None:
            fitting = FittedWeights(weights.weights)
            schedule = replace(schedule_of(plan, keys, kinds), timesteps=study.timesteps, fitted=fitting)
            found[OF_REGIONS[family], f"every {gap}th, {order + 1} values"] = schedule
    return found


class Bench:
    """A task's samples, uncached and by schedule."""

    def __init__(self, task: Task, seeds: int, samples: int, work: Path) -> None:
        self.task, self.seeds, self.samples = task, range(FIRST_SEED, FIRST_SEED + seeds), samples
        self.journal = work / f"{task.name}_{seeds}_{samples}.json"
        work.mkdir(parents=True, exist_ok=True)
        self.runs: list[Run] = json.loads(self.journal.read_text()) if self.journal.exists() else []

    def keys(self) -> tuple[str, ...]:
        """Of the model's regions."""
        inputs = self.task.noise(0, 2), torch.full((2,), 500.0), self.task.labels_of(0, 2)
        return tuple(region.key for region in moeca.explain(self._model(), *inputs).regions)

    def measure(self, wanted: Mapping[tuple[str, str], Schedule], console: Console) -> None:
        """Draw what no run of the journal has."""
        done = {(run["family"], run["setting"]) for run in self.runs}
        missing = {key: schedule for key, schedule in wanted.items() if key not in done}
        truth = self._draw(self._model()) if missing else None
        for (family, setting), schedule in missing.items():
            torch._dynamo.reset()
            model = moeca.compile(
                self._model(), schedule=schedule, granularity=schedule.granularity or "region", inner="eager"
            )
            images = self._draw(model)
            macs = moeca.stats(model).mac_fraction
            levels = [round(level, 4) for level in psnr(images, truth)]
            self.runs.append({"family": family, "setting": setting, "macs": round(macs, 5), "psnr_db": levels})
            self.journal.write_text(json.dumps(self.runs))
            console.print(family, setting, f"{macs:.1%}", f"{interval(levels)[0]:.1f} dB", highlight=False)

    def _model(self) -> Any:
        model = self.task.load().requires_grad_(False)
        moeca.prepare(model)
        return model

    @torch.no_grad()
    def _draw(self, model: Any) -> torch.Tensor:
        sample = self.task.sampler(self.samples, STEPS)
        images = []
        for seed in self.seeds:
            if hasattr(model, "_orig_mod"):
                moeca.reset(model)
            images.append(sample(model, seed))
        return torch.cat(images)


def gain(run: Run, base: Sequence[Run]) -> tuple[float, float] | None:
    """Of a run over what a mixture of the best of `base` gives for its MACs, by sample; None: it costs more or less."""
    best = {(one["macs"], interval(one["psnr_db"])[0]): one for one in base}
    corners = [best[corner] for corner in hull_of(list(best))]
    for low, high in itertools.pairwise(corners):
        if low["macs"] <= run["macs"] <= high["macs"]:
            share = (run["macs"] - low["macs"]) / (high["macs"] - low["macs"])
            pairs = zip(low["psnr_db"], high["psnr_db"], strict=True)
            return paired(run["psnr_db"], [(1 - share) * below + share * above for below, above in pairs])
    return None


def result_of(task: Task, runs: Sequence[Run]) -> dict[str, Any]:
    """Of each family and interval the better order, with its gains over output forecasts, plain and fitted."""
    lines = []
    of_regions = (*CHEAP, *OF_REGIONS.values())
    for family in (OUTPUT, FITTED, *of_regions):
        groups: dict[str, list[Run]] = {}
        for run in (one for one in runs if one["family"] == family):
            groups.setdefault(run["setting"].partition(",")[0], []).append(run)
        for group in groups.values():
            run = max(group, key=lambda one: interval(one["psnr_db"])[0])
            line = {name: run[name] for name in ("family", "setting", "macs")}
            line["psnr_db"] = [round(figure, 3) for figure in interval(run["psnr_db"])]
            for base in (OUTPUT, FITTED):
                found = gain(run, [one for one in runs if one["family"] == base]) if family in of_regions else None
                line[f"gain over {base}"] = None if found is None else [round(figure, 3) for figure in found]
            lines.append(line)
    return {"task": task.name, "samples": len(runs[0]["psnr_db"]), "lines": lines}


HEADS = (
    "between full steps",
    "full steps",
    "MACs",
    "to uncached, dB",
    "gain over output forecasts",
    "over fitted ones",
)


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows."""
    rows = []
    for line in result["lines"]:
        mean, half = line["psnr_db"]
        gains = [line[f"gain over {base}"] for base in (OUTPUT, FITTED)]
        cells = ["" if one is None else f"{one[0]:+.1f} ± {one[1]:.1f}" for one in gains]
        rows.append([line["family"], line["setting"], f"{line['macs']:.1%}", f"{mean:.1f} ± {half:.1f}", *cells])
    return rows


def report(results: Path, page: Path) -> None:
    """Write the table of a task into the page, between its two marks."""
    write_held_out(results, page, MARKS, HEADS, rows_of)


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "one interval, few samples")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--seeds", type=int, default=2, help=f"of {BATCH} samples each; default 2")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder of finished work; default {WORK}")
    parser.add_argument("--fitted", type=Path, help="the folder of benchmarks.fitted; default its own")
    parser.add_argument("--report", action="store_true", help=f"only write {PAGE}")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    name = task.results_of("beyond_output")
    if args.report:
        report(RESULTS / f"{name}.json", PAGE)
        return
    pin_threads()
    console = Console(width=160)
    seeds, samples = (1, 4) if args.quick else (args.seeds, BATCH)
    bench = Bench(task, seeds, samples, args.work)
    of_output = fitted.Bench(fitted.WHOLE, args.fitted or fitted.WORK / task.name, task)
    intervals = (6,) if args.quick else INTERVALS
    wanted = schedules(bench.keys(), of_output, intervals)
    of_regions = with_fitted_weights(task, intervals, *((2, 4) if args.quick else (8, 8)))
    bench.measure(wanted | of_regions, console)
    result = result_of(task, bench.runs)
    for row in rows_of(result):
        console.print(*row, sep="  ", highlight=False)
    folder = folder_of(args)
    if folder is not None:
        save(name, result, folder)


if __name__ == "__main__":
    main()
