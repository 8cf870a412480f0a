"""How many samples weights are fitted to: 256 held-out samples of a trained model, 95 % intervals.

    python -m benchmarks.more_samples                  # about an hour on one core; writes results/more_samples.json
    python -m benchmarks.more_samples --task glyphs    # the glyphs model; writes results/more_samples_glyphs.json
    python -m benchmarks.more_samples --quick          # few steps and samples: does it run?
    python -m benchmarks.more_samples --report         # the table of docs/fitted.md (with --task, of that one)

As `python -m benchmarks.fitted`, whose schedules are the middle ones, but with other numbers of samples a seed. The
seeds are the same: a calibration costs as many trajectories, each with more samples. Finished schedules and samples
stay in `--work`, so that a stopped run goes on. No time is told here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import fitted
from benchmarks.fitted import PAGE, Bench, computed
from benchmarks.pages import write_held_out
from benchmarks.paired import interval, paired, psnr, worst
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, TASKS, Task
from benchmarks.together import ORDERS

WORK = Path("build/more_samples")
SAMPLES = (2, fitted.WHOLE.samples, 24)  # a seed
WHOLE, QUICK = replace(fitted.WHOLE, shares=(34, 20)), fitted.QUICK
MARKS = {
    "digits": "<!-- python -m benchmarks.more_samples --report -->",
    "glyphs": "<!-- python -m benchmarks.more_samples --task glyphs --report -->",
}
HEADS = (
    "fitted to",
    "computed of 50",
    "samples fitted to",
    "to that truth, dB",
    "worst 5 %",
    "gain over the row above",
)


def measure(benches: Sequence[Bench], console: Console) -> Iterator[dict[str, Any]]:
    """The figures so far, after each truth.

    Args:
        benches: with more samples a seed from one to the next.
        console: where each line is told.
    """
    lines: list[dict[str, Any]] = []
    for truth, order in reversed(ORDERS.items()):
        wanted = benches[0].samples(truth, order=order)
        for share in benches[0].size.shares:
            before: list[float] = []
            for bench in benches:
                schedule = bench.schedule(share, truth)
                values = psnr(bench.samples(f"output_fitted_to_{truth}_{share}", schedule), wanted)
                samples = bench.size.seeds * bench.size.samples
                line = {"truth": truth, "computed": computed(schedule), "fitted_to": samples}
                line |= {"psnr_db": interval(values), "worst_5_percent_db": worst(values)}
                lines.append(line | ({"lead_db": paired(values, before)} if before else {}))
                before = values
                console.print(lines[-1], highlight=False)
        yield {"task": benches[0].task.name, "samples": len(wanted), "lines": lines}


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows."""
    rows = []
    for line in result["lines"]:
        mean, half = line["psnr_db"]
        lead = "{:+.1f} ± {:.1f}".format(*line["lead_db"]) if "lead_db" in line else ""
        told = [f"{mean:.1f} ± {half:.1f}", f"{line['worst_5_percent_db']:.1f}", lead]
        rows.append([line["truth"], str(line["computed"]), str(line["fitted_to"]), *told])
    return rows


def report(results: Path, page: Path) -> None:
    """Write the table of a task into the page, between its two marks."""
    write_held_out(results, page, MARKS, HEADS, rows_of)


def benches_of(task: Task, is_quick: bool, work: Path, of_fitted: Path) -> list[Bench]:
    """One for each number of samples; what is the same as in `benchmarks.fitted` lies in its folder."""
    if is_quick:
        return [Bench(replace(QUICK, samples=samples), work / str(samples), task) for samples in (3, QUICK.samples)]
    folders = {samples: of_fitted if samples == WHOLE.samples else work / str(samples) for samples in SAMPLES}
    return [Bench(replace(WHOLE, samples=samples), folder, task) for samples, folder in folders.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "one budget, few samples")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--work", type=Path, help=f"folder of finished work; default in {WORK}")
    parser.add_argument("--fitted", type=Path, help=f"the folder of benchmarks.fitted; default in {fitted.WORK}")
    parser.add_argument("--report", action="store_true", help=f"only write {PAGE}")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    name = task.results_of("more_samples")
    if args.report:
        report(RESULTS / f"{name}.json", PAGE)
        return
    pin_threads()
    work = args.work or WORK / ("quick" if args.quick else "") / task.name
    folder = folder_of(args)
    benches = benches_of(task, args.quick, work, args.fitted or fitted.WORK / task.name)
    for result in measure(benches, Console(width=180)):
        if folder is not None:
            save(name, result, folder)


if __name__ == "__main__":
    main()
