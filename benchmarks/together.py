"""What it adds to fit the weights of all steps together: 256 held-out samples of a trained model, 95 % intervals.

    python -m benchmarks.together                  # about 40 minutes on one core; writes results/together.json
    python -m benchmarks.together --task glyphs    # the glyphs model; writes results/together_glyphs.json
    python -m benchmarks.together --again          # calibrates anew in place of the committed schedules
    python -m benchmarks.together --quick          # few steps and digits: does it run?
    python -m benchmarks.together --report         # the table of docs/fitted.md (with --task, of that one)

*Step by step* are the committed schedules of `benchmarks.fitted`, which were calibrated on the same seeds before
`calibrate` fitted the weights together. Schedules and samples stay in `--work`, so that a stopped run goes on. Quality
doesn't depend on the machine's load; no time is told here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fitted import CONVERGED, KEPT, PAGE, QUICK, UNCACHED, WHOLE, Bench, Size, computed
from benchmarks.pages import write_held_out
from benchmarks.paired import interval, paired, psnr, worst
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, TASKS, Task

WORK = Path("build/together")
SIZE = replace(WHOLE, shares=(34, 26, 20))
MARKS = {
    "digits": "<!-- python -m benchmarks.together --report -->",
    "glyphs": "<!-- python -m benchmarks.together --task glyphs --report -->",
}
ORDERS = {UNCACHED: "euler", CONVERGED: "second"}
HEADS = ("fitted to", "computed of 50", "weights", "to that truth, dB", "worst 5 %", "gain over step by step, dB")


class TogetherBench(Bench):
    """Families are named after the truth; their schedules are calibrated by this version."""

    def __init__(self, size: Size, work: Path, task: Task = DIGITS, again: bool = False) -> None:
        super().__init__(size, work, task, again)
        self.before, self.resume = Bench(size, work / "before", task), work / "calibration"

    def truth(self, family: str) -> str:
        return family.removeprefix("together_")


def measure(bench: TogetherBench, console: Console, truths: Sequence[str] = tuple(ORDERS)) -> dict[str, Any]:
    """The figures of both fits, to each truth."""
    lines = []
    for truth in truths:
        wanted = bench.samples(truth, order=ORDERS[truth])
        for share in bench.size.shares:
            fits = {"step by step": bench.before.schedule(share, truth)}
            fits["together"] = bench.schedule(share, f"together_{truth}")
            base: list[float] = []
            for name, schedule in fits.items():
                values = psnr(bench.samples(f"{name.replace(' ', '_')}_{truth}_{share}", schedule), wanted)
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
    parser.add_argument("--work", type=Path, help=f"folder of finished work; default {WORK}")
    parser.add_argument("--truths", nargs="+", choices=ORDERS, default=list(ORDERS), help="fitted to; default both")
    parser.add_argument("--shares", nargs="+", type=int, help="of the steps, in percent; default 34 26 20")
    parser.add_argument("--again", action="store_true", help="calibrate anew in place of the committed schedules")
    parser.add_argument("--report", action="store_true", help=f"only write {PAGE}")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    name = task.results_of("together")
    if args.report:
        report(RESULTS / f"{name}.json", PAGE)
        return
    pin_threads()
    console = Console(width=180)
    work = args.work or WORK / f"{'quick_' if args.quick else ''}{args.task}"
    size = QUICK if args.quick else SIZE
    size = replace(size, shares=tuple(args.shares or size.shares))
    result = measure(bench := TogetherBench(size, work, task, args.again), console, args.truths)
    table = Table(*HEADS)
    for row in rows_of(result):
        table.add_row(*row)
    console.print(table)
    folder = folder_of(args)
    if folder is not None:
        save(name, result, folder)
        bench.keep(folder / KEPT.name)


if __name__ == "__main__":
    main()
