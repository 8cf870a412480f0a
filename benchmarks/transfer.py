"""What a schedule is worth elsewhere than where it was fitted: other guidance, steps, conditions, weights, dtype.

    python -m benchmarks.transfer                  # about 10 minutes on one core; writes results/transfer.json
    python -m benchmarks.transfer --task glyphs    # the glyphs model; writes results/transfer_glyphs.json
    python -m benchmarks.transfer --quick          # two conditions, few samples: does it run?
    python -m benchmarks.transfer --report         # the table of docs/fitted.md

The schedules are those of `python -m benchmarks.fitted`, from its own folder, or calibrated in the same way. Each
contender is compared to the uncached run under the same condition. Nothing is timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import moeca_compile as moeca
from benchmarks import fitted
from benchmarks.pages import write_held_out
from benchmarks.paired import interval, paired, psnr, worst
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, GUIDANCE, TASKS, Task
from moeca_compile.errors import MoecaWarning
from moeca_compile.schedule import Schedule

FIRST_SEED = 71_000
SHARE = 34  # of the steps, in percent, that the schedules compute
MARKS = {
    "digits": "<!-- python -m benchmarks.transfer --report -->",
    "glyphs": "<!-- python -m benchmarks.transfer --task glyphs --report -->",
}


@dataclass(frozen=True)
class Condition:
    """Where a schedule runs.

    Attributes:
        name: in the table.
        guidance, steps: of the sampler.
        change: of the model, in place.
        dtype: of the model and its latents.
    """

    name: str
    guidance: float = GUIDANCE
    steps: int = 50
    change: Callable[[nn.Module], None] | None = None
    dtype: torch.dtype = torch.float32


@torch.no_grad()
def mixed_labels(model: nn.Module) -> None:
    """Each label becomes half of itself and half of the next one: conditions that no seed of a calibration had."""
    table = model.get_submodule("y_embedder.embedding_table").weight
    assert isinstance(table, Tensor)
    labels = table[:-1]  # the last one is the null label
    table[:-1] = (labels + labels.roll(1, 0)) / 2


@torch.no_grad()
def adapted(model: nn.Module, rank: int = 4, strength: float = 0.1) -> None:
    """A random adapter merged into every linear layer of the blocks: rank 4, a tenth of the weight's norm."""
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith("blocks."):
            rows, columns = layer.weight.shape
            change = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
            layer.weight.add_(change, alpha=float(strength * layer.weight.norm() / change.norm()))


CONDITIONS = (
    Condition("as fitted"),
    Condition("guidance 1", guidance=1.0),
    Condition("guidance 1.5", guidance=1.5),
    Condition("guidance 3", guidance=3.0),
    Condition("guidance 5", guidance=5.0),
    Condition("25 steps", steps=25),
    Condition("40 steps", steps=40),
    Condition("100 steps", steps=100),
    Condition("labels mixed in pairs", change=mixed_labels),
    Condition("adapter, a tenth of the weights' norm", change=adapted),
    Condition("bfloat16", dtype=torch.bfloat16),
)
QUICK = (CONDITIONS[0], CONDITIONS[3])


class Bench:
    """A task under several conditions."""

    def __init__(self, task: Task, contenders: dict[str, Schedule], seeds: int, samples: int) -> None:
        self.task, self.contenders, self.seeds, self.samples = task, contenders, seeds, samples

    def line(self, condition: Condition) -> dict[str, Any]:
        """The figures of all contenders under a condition."""
        truth, _ = self._draw(condition, None)
        figures = {}
        for name, schedule in self.contenders.items():
            images, said = self._draw(condition, schedule)
            figures[name] = {"psnr_db": psnr(images, truth), "warned": said}
        return {"condition": condition.name, **figures}

    def _draw(self, condition: Condition, schedule: Schedule | None) -> tuple[Tensor, bool]:
        """Samples (N,1,H,W), and whether a warning was given."""
        torch._dynamo.reset()
        model: Any = self.task.load().requires_grad_(False)
        if condition.change is not None:
            condition.change(model)
        model.to(condition.dtype)
        moeca.prepare(model)
        if schedule is not None:
            granularity = schedule.granularity or "region"
            model = moeca.compile(model, schedule=schedule, granularity=granularity, inner="eager")

        def in_dtype(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            output: Tensor = model(x.to(condition.dtype), t, y)
            return output.float()

        sample = self.task.sampler(self.samples, condition.steps, guidance=condition.guidance)
        images = []
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MoecaWarning)
            for seed in range(FIRST_SEED, FIRST_SEED + self.seeds):
                if schedule is not None:
                    moeca.reset(model)
                images.append(sample(in_dtype, seed))
        return torch.cat(images), any(issubclass(entry.category, MoecaWarning) for entry in caught)


def contenders_of(bench: fitted.Bench) -> dict[str, Schedule]:
    """The fitted schedule, the same without its weights, and the one of regions."""
    output = bench.schedule(SHARE, fitted.UNCACHED)
    return {
        "output, fitted to uncached": output,
        "output, polynomial": replace(output, output=None),
        "regions, polynomial": bench.schedule(SHARE, fitted.REGIONS),
    }


def measure(bench: Bench, conditions: Sequence[Condition], console: Console) -> dict[str, Any]:
    """The figures of every condition; leads are of the fitted schedule, sample by sample."""
    lines = []
    for condition in conditions:
        figures = bench.line(condition)
        name, *others = bench.contenders
        ours = figures[name]["psnr_db"]
        lines.append(
            {
                "condition": condition.name,
                "psnr_db": {other: _rounded(interval(figures[other]["psnr_db"])) for other in bench.contenders},
                "worst_5_percent_db": round(worst(ours), 2),
                "lead_db": {other: _rounded(paired(ours, figures[other]["psnr_db"])) for other in others},
                "warned": figures[name]["warned"],
            }
        )
        console.print(lines[-1], highlight=False)
    return {"task": bench.task.name, "samples": bench.seeds * bench.samples, "share": SHARE, "lines": lines}


def _rounded(figures: tuple[float, float]) -> list[float]:
    return [round(figure, 2) for figure in figures]


HEADS = ("condition", "fitted, dB", "worst 5 %", "polynomial, dB", "regions, dB", "fitted less regions", "a warning")


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows."""
    rows = []
    for line in result["lines"]:
        fitted_db, polynomial, regions = (f"{mean:.1f} ± {half:.1f}" for mean, half in line["psnr_db"].values())
        mean, half = line["lead_db"]["regions, polynomial"]
        lead, said = f"{mean:+.1f} ± {half:.1f}", "yes" if line["warned"] else "no"
        rows.append(
            [line["condition"], fitted_db, f"{line['worst_5_percent_db']:.1f}", polynomial, regions, lead, said]
        )
    return rows


def report(results: Path, page: Path) -> None:
    """Write the table of a task into the page, between its two marks."""
    write_held_out(results, page, MARKS, HEADS, rows_of)


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "two conditions, few samples")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--seeds", type=int, default=2, help="of 32 samples each; default 2")
    parser.add_argument("--fitted", type=Path, help="the folder of benchmarks.fitted; default its own")
    parser.add_argument("--report", action="store_true", help=f"only write {fitted.PAGE}")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    name = task.results_of("transfer")
    if args.report:
        report(RESULTS / f"{name}.json", fitted.PAGE)
        return
    pin_threads()
    console = Console(width=180)
    size = replace(fitted.WHOLE, shares=(SHARE,))
    schedules = fitted.Bench(size, args.fitted or fitted.WORK / task.name, task)
    seeds, samples = (1, 4) if args.quick else (args.seeds, 32)
    bench = Bench(task, contenders_of(schedules), seeds, samples)
    result = measure(bench, QUICK if args.quick else CONDITIONS, console)
    table = Table(*HEADS)
    for row in rows_of(result):
        table.add_row(*row)
    console.print(table)
    folder = folder_of(args)
    if folder is not None:
        save(name, result, folder)


if __name__ == "__main__":
    main()
