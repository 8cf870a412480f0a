"""Caching at 4, 8 and 12 steps: what is left to gain where a sampler takes few steps anyway.

    python -m benchmarks.few_steps            # about 10 minutes on one core; writes results/few_steps.json
    python -m benchmarks.few_steps --quick    # 4 steps, few digits: does it run?
    python -m benchmarks.few_steps --report   # the table of docs/few-steps.md

As `python -m benchmarks.fitted` on the digits model, but with other numbers of steps. The converged truth is a
second-order run with about 200 steps, and the weights for it are fitted to samples of that run. No time is told here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import fitted
from benchmarks.fitted import CONVERGED, Size
from benchmarks.pages import write_table
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save, when
from benchmarks.tasks import DIGITS

WORK = Path("build/few_steps")
PAGE = Path("docs/few-steps.md")
MARK = "<!-- python -m benchmarks.few_steps --report -->"
TASK = replace(DIGITS, regions=None)  # committed schedules are for 50 steps
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


def report(results: Path, page: Path) -> None:
    """Write the table into the page, between its two marks."""
    result = json.loads(results.read_text())
    rows = [[str(table["steps"]), *row] for table in result["tables"] for row in fitted.rows_of(table)]
    samples = result["tables"][0]["samples"]
    write_table(page, MARK, HEADS, rows, f"{samples} held-out digits; {when(result['machine'])}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "4 steps, few digits")
    parser.add_argument("--work", type=Path, help=f"folder of finished work; default {WORK}")
    parser.add_argument("--report", action="store_true", help=f"only write {PAGE}")
    args = parser.parse_args(argv)
    if args.report:
        report(RESULTS / "few_steps.json", PAGE)
        return
    pin_threads()
    console, tables = Console(width=180), []
    work = args.work or (WORK / "quick" if args.quick else WORK)
    for size in QUICK if args.quick else WHOLE:
        table = fitted.measure(Bench(size, work / str(size.steps), TASK), console)
        fitted.show(table, console)
        tables.append({"steps": size.steps, **table})
    folder = folder_of(args)
    if folder is not None:
        payload: dict[str, Any] = {"tables": tables}
        save("few_steps", payload, folder)


if __name__ == "__main__":
    main()
