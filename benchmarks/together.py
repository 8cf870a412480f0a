"""What it adds to fit the weights of all steps together: 256 held-out samples of a trained model, 95 % intervals.

    python -m benchmarks.together                  # about 10 minutes on one core; writes results/together.json
    python -m benchmarks.together --task glyphs    # the glyphs model; writes results/together_glyphs.json
    python -m benchmarks.together --quick          # few steps and digits: does it run?
    python -m benchmarks.together --report         # the table of docs/fitted.md (with --task, of that one)

Both schedules of a line come from one calibration of `benchmarks.fitted`: *step by step* is what the fit of all weights
together began with. Samples stay in the folder of that benchmark. Quality doesn't depend on the machine's load; no time
is told here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import fitted
from benchmarks.fitted import CONVERGED, PAGE, STEPWISE, UNCACHED, Bench, computed
from benchmarks.pages import write_held_out
from benchmarks.paired import interval, paired, psnr, worst
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, TASKS

MARKS = {
    "digits": "<!-- python -m benchmarks.together --report -->",
    "glyphs": "<!-- python -m benchmarks.together --task glyphs --report -->",
}
ORDERS = {UNCACHED: "euler", CONVERGED: "second"}
HEADS = ("fitted to", "computed of 50", "weights", "to that truth, dB", "worst 5 %", "gain over step by step, dB")


def measure(bench: Bench, console: Console) -> dict[str, Any]:
    """The figures of both fits, to each truth."""
    lines = []
    for truth, order in ORDERS.items():
        wanted = bench.samples(truth, order=order)
        for share in bench.size.shares:
            together, before = bench.schedule(share, truth), bench.schedule(share, f"{STEPWISE}_{truth}")
            named = {"step by step": before, "together": together}
            files = {"step by step": f"{STEPWISE}_{truth}_{share}", "together": f"output_fitted_to_{truth}_{share}"}
            base: list[float] = []
            for name, schedule in named.items():
                values = psnr(bench.samples(files[name], schedule), wanted)
                line = {"truth": truth, "computed": computed(schedule), "name": name}
                line |= {"psnr_db": interval(values), "worst_5_percent_db": worst(values)}
                lines.append(line | ({"lead_db": paired(values, base)} if base else {}))
                base = values
                console.print(lines[-1], highlight=False)
    return {"task": bench.task.name, "samples": len(wanted), "lines": lines}


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows."""
    rows = []
    for line in result["lines"]:
        mean, half = line["psnr_db"]
        lead = "{:+.1f} ± {:.1f}".format(*line["lead_db"]) if "lead_db" in line else ""
        told = [f"{mean:.1f} ± {half:.1f}", f"{line['worst_5_percent_db']:.1f}", lead]
        rows.append([line["truth"], str(line["computed"]), line["name"], *told])
    return rows


def report(results: Path, page: Path) -> None:
    """Write the table of a task into the page, between its two marks."""
    write_held_out(results, page, MARKS, HEADS, rows_of)


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "one budget, few digits")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--work", type=Path, help=f"the folder of benchmarks.fitted; default in {fitted.WORK}")
    parser.add_argument("--report", action="store_true", help=f"only write {PAGE}")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    name = task.results_of("together")
    if args.report:
        report(RESULTS / f"{name}.json", PAGE)
        return
    pin_threads()
    console = Console(width=180)
    work = args.work or fitted.WORK / f"{'quick_' if args.quick else ''}{args.task}"
    result = measure(Bench(fitted.QUICK if args.quick else fitted.WHOLE, work, task), console)
    table = Table(*HEADS)
    for row in rows_of(result):
        table.add_row(*row)
    console.print(table)
    folder = folder_of(args)
    if folder is not None:
        save(name, result, folder)


if __name__ == "__main__":
    main()
