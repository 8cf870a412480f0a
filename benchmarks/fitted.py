"""Fitted weights of the model's output, to both truths: 256 held-out samples of a trained model, 95 % intervals.

    python -m benchmarks.fitted                  # about 25 minutes on one core; writes results/fitted.json
    python -m benchmarks.fitted --task glyphs    # the glyphs model; writes results/fitted_glyphs.json
    python -m benchmarks.fitted --again          # calibrates anew in place of the committed schedules
    python -m benchmarks.fitted --times          # only: does it help to search the timesteps too?
    python -m benchmarks.fitted --quick          # few steps and digits: does it run?
    python -m benchmarks.fitted --report         # docs/fitted.md from the results (with --task, of that one)

Every contender makes the same samples with Euler steps and guidance 2, and computes the model at as many of 50 steps.
Schedules are calibrated on other seeds than those told; those of the whole size are committed in results/schedules.
Finished schedules and samples stay in `--work`, so that a stopped run goes on. Quality doesn't depend on the machine's
load; no time is told here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moeca_compile as moeca
from benchmarks.pages import write_held_out
from benchmarks.paired import interval, paired, psnr, worst
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, TASKS, Task
from moeca_compile.planner import calibration
from moeca_compile.planner.output import rule
from moeca_compile.planner.output.together import FittedTogether, fit_together
from moeca_compile.schedule import Action, Schedule

WORK = Path("build/fitted")
KEPT = RESULTS / "schedules"  # committed, of the whole size: <task>_<family>_<share>.json
PAGE = Path("docs/fitted.md")
REGIONS, UNCACHED, CONVERGED, TIMES = "regions", "uncached", "converged", "times"
FITTED_REGIONS = "fitted_regions"
STEPWISE = "stepwise"  # before the name of a truth: as it was before all weights were fitted together
FIRST_SEED = 70_000  # of those that are told
MARKS = {
    "digits": "<!-- python -m benchmarks.fitted --report -->",
    "glyphs": "<!-- python -m benchmarks.fitted --task glyphs --report -->",
}

TIMES_MARKS = {name: mark.replace("--report", "--times --report") for name, mark in MARKS.items()}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        steps: of the sampler.
        finer: times the steps of the second-order run that counts as converged.
        shares: of the steps, in percent, that compute the model.
        seeds, samples: of the calibration: seeds, and samples a seed.
        held_out, batch: seeds that are told, and samples a seed.
    """

    steps: int
    finer: int
    shares: tuple[int, ...]
    seeds: int
    samples: int
    held_out: int
    batch: int


WHOLE = Size(50, 4, (50, 34, 26, 20), 8, 8, 8, 32)
QUICK = Size(50, 2, (20,), 4, 4, 1, 4)
OF_TIMES = replace(WHOLE, shares=(34, 20))


class Bench:
    """A task's model, and what was sampled with it."""

    inner = "inductor"
    resume: Path | None = None

    def __init__(self, size: Size, work: Path, task: Task = DIGITS, again: bool = False) -> None:
        """`again`: calibrate, also where a schedule is committed."""
        self.size, self.work, self.task, self.again = size, work, task, again
        work.mkdir(parents=True, exist_ok=True)

    def schedule(self, share: int, family: str) -> Schedule:
        """A known schedule, or a calibrated one.

        Args:
            share: of the steps, in percent.
            family: `REGIONS`, with the polynomial's weights, or `FITTED_REGIONS`; the truth of the output's weights,
                also after `STEPWISE`; or `TIMES`, fitted to the converged truth with the timesteps searched.

        Raises:
            ValueError: what `calibrate` gave has no weights, and so none of step by step.
        """
        if self.known(share, family) is None:
            self._calibrate(family)
        path = self.known(share, family)
        if path is None:
            raise ValueError(
                f"{self.task.name}: calibrate fitted no weights for {share} %, so there are none step by step"
            )
        return Schedule.load(path)

    def known(self, share: int, family: str) -> Path | None:
        """The file of a committed schedule, or of one that an earlier run calibrated."""
        committed = [self.task.committed(share)] if family == REGIONS else []
        if self._whole and not self.again:
            committed.append(KEPT / f"{self.task.name}_{family}_{share}.json")
        paths = [path for path in (*committed, self.work / f"{family}_{share}.json") if path is not None]
        return next((path for path in paths if path.exists()), None)

    @property
    def _whole(self) -> bool:
        """Whether schedules are calibrated on as much as the committed ones."""
        return all(getattr(self.size, name) == getattr(WHOLE, name) for name in ("steps", "seeds", "samples"))

    def keep(self, folder: Path) -> None:
        """Copy the calibrated schedules of the whole size to where committed ones are."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.work.glob("*.json") if self._whole else ():
            shutil.copyfile(path, folder / f"{self.task.name}_{path.name}")

    def _calibrate(self, family: str) -> None:
        """Save the schedules of a family, for all shares that lack one."""
        size = self.size
        missing = [share for share in size.shares if self.known(share, family) is None]
        family = family.removeprefix(f"{STEPWISE}_")  # both come from one calibration
        # half a step more than the computed ones, for what cheap steps cost
        budgets = {share: f"macs:{(round(share * size.steps / 100) + 0.5) / size.steps:.4f}" for share in missing}

        def calibrated_on(model: Any, seed: int, steps: int = size.steps) -> Tensor:
            return self.task.sampler(size.samples, steps)(model, seed)

        def timed(model: Any, seed: int, steps: int = size.steps, timesteps: Sequence[float] = ()) -> Tensor:
            return self.task.sampler(size.samples, steps, timesteps=timesteps)(model, seed)

        kind: dict[str, Any] = {"granularity": "region"}
        if family not in (REGIONS, FITTED_REGIONS):
            kind = {"granularity": "output", "truth": self.truth(CONVERGED if family == TIMES else family)}
        before: list[Schedule] = []
        with noted(before), polynomials(only=family == REGIONS):
            front = moeca.calibrate_front(
                self.task.load(), timed if family == TIMES else calibrated_on,
                budgets=[budgets[share] for share in missing], seeds=size.seeds, holdout=2, data_range=2.0,
                inner=self.inner, resume=self.resume, **kind,
            )  # fmt: skip
        stepwise = {schedule.rows: schedule for schedule in before}
        for share in missing:
            schedule = front.at(budgets[share])
            schedule.save(self.work / f"{family}_{share}.json")
            if family in (UNCACHED, CONVERGED) and schedule.rows in stepwise:
                stepwise[schedule.rows].save(self.work / f"{STEPWISE}_{family}_{share}.json")

    def truth(self, family: str) -> Any:
        """What the weights of a family are fitted to, as `calibrate` takes it."""
        return family

    def samples(self, name: str, schedule: Schedule | None = None, order: str = "euler") -> Tensor:
        """The held-out samples; kept in a file of that name and schedule, which grows by a seed at a time."""
        path, size = self.work / (f"{name}.pt" if schedule is None else f"{name}_{mark_of(schedule)}.pt"), self.size
        images = list(torch.load(path).split(size.batch)) if path.exists() else []
        if len(images) < size.held_out:
            model = self._model(schedule)
            times, second_order = (1, False) if order == "euler" else (size.finer, True)
            given = schedule.timesteps if schedule is not None and schedule.searched_timesteps else ()
            sample = self.task.sampler(size.batch, times * size.steps, second_order, timesteps=given)
            for seed in range(FIRST_SEED + len(images), FIRST_SEED + size.held_out):
                if schedule is not None:
                    moeca.reset(model)
                with torch.no_grad():
                    images.append(sample(model, seed))
                torch.save(torch.cat(images), path)
        return torch.cat(images[: size.held_out])

    def _model(self, schedule: Schedule | None) -> Callable[..., Any]:
        torch._dynamo.reset()  # each contender compiles the same class anew
        model = self.task.load().requires_grad_(False)
        if schedule is None:
            moeca.prepare(model)
            return torch.compile(model, backend=self.inner)
        return moeca.compile(model, schedule=schedule, granularity=schedule.granularity or "region", inner=self.inner)


@contextmanager
def noted(before: list[Schedule]) -> Iterator[None]:
    """In this context, calibrations note the schedules that they begin to fit together."""

    def noting(study: Any, sampler: Any, start: Schedule) -> FittedTogether | None:
        before.append(start)
        return fit_together(study, sampler, start)

    with patch.object(rule, "fit_together", noting):
        yield


@contextmanager
def polynomials(only: bool) -> Iterator[None]:
    """In this context, calibrations try no fitted weights of regions, if so."""
    with patch.object(calibration, "with_fitted_weights", lambda *given: None) if only else nullcontext():
        yield


def mark_of(schedule: Schedule) -> str:
    """Short, and another one for another schedule."""
    return sha256(schedule.to_json().encode()).hexdigest()[:8]


def computed(schedule: Schedule) -> int:
    """How many steps compute everything."""
    return sum(set(row) == {Action.COMPUTE} for row in schedule.rows)


def measure(bench: Bench, console: Console) -> dict[str, Any]:
    """The figures of every contender."""
    truths = {UNCACHED: bench.samples(UNCACHED), CONVERGED: bench.samples(CONVERGED, order="second")}
    own = {name: psnr(truths[UNCACHED], truth) for name, truth in truths.items()}
    lines = [_line("every step computed", bench.size.steps, {CONVERGED: own[CONVERGED]}, {}, None)]
    for share in bench.size.shares:
        fitted = {truth: bench.schedule(share, truth) for truth in truths}
        contenders = {
            "regions, polynomial": bench.schedule(share, REGIONS),
            "regions, fitted weights": bench.schedule(share, FITTED_REGIONS),
            "output, polynomial": replace(fitted[UNCACHED], output=None),
            "output, fitted to uncached": fitted[UNCACHED],
            "output, fitted to converged": fitted[CONVERGED],
        }
        base: dict[str, list[float]] = {}
        for name, schedule in contenders.items():
            images = bench.samples(f"{name.replace(', ', '_').replace(' ', '_')}_{share}", schedule)
            qualities = {truth: psnr(images, truths[truth]) for truth in truths}
            base = base or qualities
            leads = {UNCACHED: paired(qualities[UNCACHED], base[UNCACHED])} if qualities is not base else {}
            leads[CONVERGED] = paired(qualities[CONVERGED], own[CONVERGED])
            line = _line(name, computed(schedule), qualities, leads, schedule.predicted.get("trajectories"))
            none_better = name == "regions, fitted weights" and schedule.fitted is None
            lines.append({**line, "none_better": True} if none_better else line)
            console.print(lines[-1], highlight=False)
    return {"task": bench.task.name, "samples": len(own[CONVERGED]), "lines": lines}


class TimesBench(Bench):
    """With and without searched timesteps: both calibrations share what they sample."""

    def __init__(self, size: Size, work: Path, task: Task = DIGITS, again: bool = False) -> None:
        super().__init__(size, work, task, again)
        self.resume = work / "calibration"


def measure_times(bench: Bench, console: Console) -> dict[str, Any]:
    """The figures of schedules fitted to the converged truth, with searched timesteps and without."""
    truth = bench.samples(CONVERGED, order="second")
    own = psnr(bench.samples(UNCACHED), truth)
    lines = [_line("every step computed", bench.size.steps, {CONVERGED: own}, {}, None)]
    for share in bench.size.shares:
        # first the one that samples more
        contenders = {family: bench.schedule(share, family) for family in (TIMES, CONVERGED)}
        base = psnr(bench.samples(f"{CONVERGED}_{share}", contenders[CONVERGED]), truth)
        for family, name in ((CONVERGED, "the sampler's own timesteps"), (TIMES, "searched timesteps")):
            schedule = contenders[family]
            values = psnr(bench.samples(f"{family}_{share}", schedule), truth)
            leads = {CONVERGED: paired(values, own)} | ({TIMES: paired(values, base)} if family == TIMES else {})
            kept = family == TIMES and not schedule.searched_timesteps
            predicted = {key: schedule.predicted.get(f"tried {key} timesteps") for key in ("own", "searched")}
            line = _line(name, computed(schedule), {CONVERGED: values}, leads, schedule.predicted["trajectories"])
            lines.append(line | {"kept_own": kept, "predicted_db": predicted, "timesteps": schedule.timesteps})
            console.print(lines[-1], highlight=False)
    return {"task": bench.task.name, "samples": len(own), "lines": lines}


def rows_of_times(result: dict[str, Any]) -> list[list[str]]:
    """The rows of the table of timesteps."""
    rows = []
    for line in result["lines"]:
        figures, leads = line["psnr_db"][CONVERGED], line["lead_db"]
        told = [f"{leads[name][0]:+.1f} ± {leads[name][1]:.1f}" if name in leads else "" for name in (TIMES, CONVERGED)]
        name = line["name"] + (" (none better found)" if line.get("kept_own") else "")
        quality = [f"{figures[0]:.1f} ± {figures[1]:.1f}", f"{line['worst_5_percent_db'][CONVERGED]:.1f}"]
        rows.append([str(line["computed"]), name, *quality, *told])
    return rows


def _line(
    name: str, computed: int, qualities: dict[str, list[float]], leads: dict[str, tuple[float, float]],
    trajectories: float | None,
) -> dict[str, Any]:  # fmt: skip
    """`leads`: over the region schedule to the uncached truth, over the uncached run to the converged one."""
    return {
        "name": name,
        "computed": computed,
        "psnr_db": {truth: [round(figure, 3) for figure in interval(values)] for truth, values in qualities.items()},
        "worst_5_percent_db": {truth: round(worst(values), 3) for truth, values in qualities.items()},
        "lead_db": {truth: [round(figure, 3) for figure in lead] for truth, lead in leads.items()},
        "trajectories": None if trajectories is None else round(trajectories, 1),
    }


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows: steps, contender, and for each truth the mean, the worst twentieth and the lead."""
    rows = []
    for line in result["lines"]:
        cells = [str(line["computed"]), line["name"] + (" (none better found)" if "none_better" in line else "")]
        for truth in (UNCACHED, CONVERGED):
            figures = line["psnr_db"].get(truth)
            lead = line["lead_db"].get(truth)
            cells.append("" if figures is None else f"{figures[0]:.1f} ± {figures[1]:.1f}")
            cells.append("" if figures is None else f"{line['worst_5_percent_db'][truth]:.1f}")
            cells.append("" if lead is None else f"{lead[0]:+.1f} ± {lead[1]:.1f}")
        cells.append("" if line["trajectories"] is None else f"{line['trajectories']:.0f}")
        rows.append(cells)
    return rows


HEADS = (
    "computed of 50", "schedule", "to uncached, dB", "worst 5 %", "less regions", "to converged, dB", "worst 5 %",
    "less uncached run", "trajectories to calibrate",
)  # fmt: skip


TIMES_HEADS = (
    "computed of 50", "steps", "to converged, dB", "worst 5 %", "less own timesteps", "less uncached run",
)  # fmt: skip


def show(result: dict[str, Any], console: Console, times: bool = False) -> None:
    """Print the table; `times`: that of the timesteps."""
    table = Table(*(TIMES_HEADS if times else HEADS))
    for row in rows_of_times(result) if times else rows_of(result):
        table.add_row(*row)
    console.print(table)


def report(results: Path, page: Path, times: bool = False) -> None:
    """Write the table of a task into the page, between its two marks; `times`: that of the timesteps."""
    if times:
        write_held_out(results, page, TIMES_MARKS, TIMES_HEADS, rows_of_times)
    else:
        write_held_out(results, page, MARKS, HEADS, rows_of)


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "one budget, few digits")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--work", type=Path, help=f"folder of finished work; default {WORK}")
    parser.add_argument("--again", action="store_true", help="calibrate anew in place of the committed schedules")
    parser.add_argument("--times", action="store_true", help="only the timesteps: searched, or the sampler's own")
    parser.add_argument("--report", action="store_true", help=f"only write {PAGE}")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    name = task.results_of("fitted_times" if args.times else "fitted")
    if args.report:
        report(RESULTS / f"{name}.json", PAGE, args.times)
        return
    pin_threads()
    console = Console(width=180)
    work = args.work or WORK / f"{'quick_' if args.quick else ''}{'times_' if args.times else ''}{args.task}"
    size = QUICK if args.quick else OF_TIMES if args.times else WHOLE
    bench = (TimesBench if args.times else Bench)(size, work, task, args.again)
    result = (measure_times if args.times else measure)(bench, console)
    show(result, console, args.times)
    folder = folder_of(args)
    if folder is not None:
        save(name, result, folder)
        bench.keep(folder / KEPT.name)


if __name__ == "__main__":
    main()
