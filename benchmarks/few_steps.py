"""Caching at 4, 8 and 12 steps: what is left to gain where a sampler takes few steps anyway.

    python -m benchmarks.few_steps                  # about 10 minutes on one core; writes results/few_steps.json
    python -m benchmarks.few_steps --task glyphs    # the glyphs model, about 40; results/few_steps_glyphs.json
    python -m benchmarks.few_steps --quick          # 4 steps, few samples: does it run?
    python -m benchmarks.few_steps --report         # the table of docs/few-steps.md (with --task, of that one)

As `python -m benchmarks.fitted`, but with other numbers of steps. The converged truth is a second-order run with about
200 steps, and the weights for it are fitted to samples of that run. No time is told here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import fitted
from benchmarks.fitted import CONVERGED, Size
from benchmarks.pages import write_held_out
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, TASKS

WORK = Path("build/few_steps")
PAGE = Path("docs/few-steps.md")
MARKS = {
    "digits": "<!-- python -m benchmarks.few_steps --report -->",
    "glyphs": "<!-- python -m benchmarks.few_steps --task glyphs --report -->",
}
FINE = 200  # steps of the converged run, about
WHOLE = tuple(
    Size(steps, FINE // steps, shares, 8, 8, 8, 32)
    for steps, shares in ((4, (75, 50)), (8, (75, 50)), (12, (75, 50, 33)))
)
QUICK = (Size(4, 2, (75,), 4, 4, 1, 4),)


class Bench(fitted.Bench):
    """Fits to samples of the converged run: two and four times the steps would not be near it."""

    inner = "eager"  # few steps are sampled sooner than compiled, and quality is the same

    def truth(self, family: str) -> str | Callable[[int], Tensor]:
        """`uncached`, or the samples of the converged run by seed."""
        if family != CONVERGED:
            return family
        model, size = self.task.load().requires_grad_(False), self.size
        sample = self.task.sampler(size.samples, size.finer * size.steps, second_order=True)

        def samples(seed: int) -> Tensor:
            with torch.no_grad():
                return sample(model, seed)

        return samples


HEADS = ("steps", *("computed" if head.startswith("computed") else head for head in fitted.HEADS))


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """The rows of all tables."""
    return [[str(table["steps"]), *row] for table in result["tables"] for row in fitted.rows_of(table)]


def report(results: Path, page: Path) -> None:
    """Write the table of a task into the page, between its two marks."""
    write_held_out(results, page, MARKS, HEADS, rows_of)


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "4 steps, few samples")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--work", type=Path, help=f"folder of finished work; default in {WORK}")
    parser.add_argument("--report", action="store_true", help=f"only write {PAGE}")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    name = task.results_of("few_steps")
    if args.report:
        report(RESULTS / f"{name}.json", PAGE)
        return
    pin_threads()
    console, tables = Console(width=180), []
    work = args.work or WORK / ("quick" if args.quick else "") / task.name
    own = replace(task, regions=None)  # committed schedules are for 50 steps
    for size in QUICK if args.quick else WHOLE:
        table = fitted.measure(Bench(size, work / str(size.steps), own), console)
        fitted.show(table, console)
        tables.append({"steps": size.steps, **table})
    folder = folder_of(args)
    if folder is not None:
        payload: dict[str, Any] = {"task": task.name, "samples": tables[0]["samples"], "tables": tables}
        save(name, payload, folder)


if __name__ == "__main__":
    main()
