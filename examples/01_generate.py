"""Draw digits with plain torch.compile and with moeca, and show what mending the graph and caching each save and cost.

    python -m examples.01_generate            # a table, and demo.png
    python -m examples.01_generate --json     # the figures as one line of JSON

The model as shipped breaks its graph at every dispatch of tokens to experts. `moeca.prepare` rewrites these; the second
contender is plain torch.compile of the rewritten model, so that its speedup is that of the whole graph alone. Two
contenders cache: what the regions of the graph give, or what the whole model returns. The sampler is the same. Runs
alternate, compile time is apart, figures are medians. The schedules were calibrated by `benchmarks.fitted` on other
seeds than these.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import moeca_compile as moeca
from examples import digits
from moeca_compile.schedule import Action, Schedule

SCHEDULES = Path(__file__).parents[1] / "benchmarks" / "results" / "schedules"
PLAIN, PREPARED, REGIONS, OUTPUT = "torch.compile", "torch.compile prepared", "moeca, regions", "moeca, output"
CACHED = {  # by contender, the schedule: both compute 17 of 50 steps, and forecast with fitted weights
    REGIONS: SCHEDULES / "digits_fitted_regions_34.json",
    OUTPUT: SCHEDULES / "digits_uncached_34.json",
}
BATCH = 32  # digits a run; with guidance the model sees twice as many
FIRST_SEED = 2000


@dataclass(frozen=True)
class Figures:
    """What one contender took and gave.

    Attributes:
        seconds: the median of its runs of `BATCH` digits.
        compile_seconds: before the first run.
        speedup: over torch.compile of the model as shipped; a ratio of medians.
        speedup_caching: over torch.compile of the prepared model; None: nothing is prepared.
        mac_fraction: of the multiply-accumulates of the uncached run.
        psnr_db: to the digits of torch.compile of the model as shipped; None: the same bits.
        state_bytes: kept between steps.
    """

    seconds: float
    compile_seconds: float
    speedup: float
    speedup_caching: float | None
    mac_fraction: float = 1.0
    psnr_db: float | None = None
    state_bytes: int = 0


class Contender:
    """A compiled model, and the digits and seconds it has made so far; its runs use seeds one after another."""

    def __init__(self, compiled: Callable[[nn.Module], Any], warm_up: Callable[..., object], steps: int) -> None:
        self.steps = steps
        self.images: list[Tensor] = []
        self.seconds: list[float] = []
        shipped = digits.load_model()
        started = time.perf_counter()
        self.model = compiled(shipped)
        with torch.no_grad():
            warm_up(self.model, *example_inputs())
        self.compile_seconds = time.perf_counter() - started

    def run(self, advance: Callable[[int, Tensor], None]) -> None:
        started = time.perf_counter()
        images = digits.sample(
            self.model, seed=FIRST_SEED + len(self.images), n=BATCH, steps=self.steps, callback=advance
        )
        self.seconds.append(time.perf_counter() - started)
        self.images.append(images)

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


def example_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """One call of the sampler: conditional half, then unconditional."""
    noise, labels = digits.initial_noise(seed=0, n=BATCH), digits.labels_of(BATCH)
    t = torch.full((2 * BATCH,), 1000.0)
    return torch.cat([noise, noise]), t, torch.cat([labels, torch.full_like(labels, digits.CLASSES)])


def contenders(steps: int, console: Console) -> dict[str, Contender]:
    """All, compiled, by name."""

    def call(model: Any, *inputs: Tensor) -> object:
        return model(*inputs)

    def prepared(model: nn.Module) -> Any:
        moeca.prepare(model)
        return torch.compile(model)

    def cached(path: Path) -> Callable[[nn.Module], Any]:
        granularity = Schedule.load(path).granularity or "region"
        return partial(moeca.compile, schedule=path, granularity=granularity)

    ways = {PLAIN: torch.compile, PREPARED: prepared} | {name: cached(path) for name, path in CACHED.items()}
    found: dict[str, Contender] = {}
    for name, compiled in ways.items():
        with console.status(f"compiling: {name}"):
            found[name] = Contender(compiled, moeca.warmup if name in CACHED else call, steps)
    return found


def compare(found: dict[str, Contender], runs: int, steps: int, console: Console) -> dict[str, Figures]:
    """Sample with one after the other, `runs` times."""
    with Progress(console=console) as progress:
        task = progress.add_task("sampling", total=len(found) * runs * steps)
        for _ in range(runs):
            for contender in found.values():
                contender.run(lambda step, x: progress.advance(task))
    return {name: figures_of(name, found) for name in found}


def figures_of(name: str, found: dict[str, Contender]) -> Figures:
    own, plain, prepared = found[name], found[PLAIN], found[PREPARED]
    seconds = own.median_seconds
    caching = None if name == PLAIN else prepared.median_seconds / seconds
    figures = Figures(seconds, own.compile_seconds, plain.median_seconds / seconds, caching)
    if name in CACHED:
        stats = moeca.stats(own.model)
        figures = replace(figures, mac_fraction=stats.mac_fraction, state_bytes=stats.state_bytes)
    psnr = digits.psnr(torch.cat(own.images), torch.cat(plain.images)).mean().item()
    return replace(figures, psnr_db=psnr if math.isfinite(psnr) else None)


def print_table(figures: dict[str, Figures], samples: int, steps: int, console: Console) -> None:
    title = f"{BATCH} digits, {steps} steps, guidance 2; quality over {samples} digits"
    table = Table("", *figures, title=title, title_justify="left")
    rows: dict[str, Callable[[Figures], str]] = {
        "seconds": lambda one: f"{one.seconds:.2f}",
        "speedup": lambda one: f"{one.speedup:.2f}",
        "by caching alone": lambda one: "" if one.speedup_caching is None else f"{one.speedup_caching:.2f}",
        "share of the MACs": lambda one: f"{one.mac_fraction:.1%}",
        "PSNR to uncached, dB": lambda one: "" if one.psnr_db is None else f"{one.psnr_db:.1f}",
        "state, MB": lambda one: f"{one.state_bytes / 1e6:.1f}",
        "compile seconds, once": lambda one: f"{one.compile_seconds:.1f}",
    }
    for head, told in rows.items():
        table.add_row(head, *map(told, figures.values()))
    console.print(table)
    console.print("seconds: medians of runs that take turns; a speedup is the ratio of two of them")
    console.print("by caching alone: speedup over torch.compile prepared. Both caches forecast with fitted weights")


def draw(found: dict[str, Contender], steps: int, path: Path) -> None:
    """One picture: rows of ten digits, and what each step of the two schedules computes, regions x steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    rows = {name: found[name] for name in (PLAIN, *CACHED)}
    figure, axes = pyplot.subplots(5, 1, figsize=(12, 8), height_ratios=(1, 1, 1, 1.6, 0.4), layout="constrained")
    for (title, contender), above in zip(rows.items(), axes[:3], strict=True):
        digits_row = torch.cat(list(contender.images[0][:10, 0]), dim=1).clamp(-1, 1)
        above.imshow(digits_row.numpy(), cmap="gray_r", vmin=-1, vmax=1)
        above.set_title(title, loc="left")
        above.axis("off")
    for (name, file), below in zip(CACHED.items(), axes[3:], strict=True):
        schedule = Schedule.load(file)
        times = [1000.0 * (1 - step / steps) for step in range(steps)]
        each = [schedule.rows[schedule.row_index(step, times[step]) or 0] for step in range(steps)]
        computed = [[row[column] is Action.COMPUTE for row in each] for column in range(len(each[0]))]
        below.pcolormesh(computed, cmap=ListedColormap(["#e8e8e8", "#27598c"]), edgecolors="white", linewidth=0.5)
        below.set_title(f"what each step of {name} computes (dark) and forecasts (light)", loc="left")
        below.set_yticks([row + 0.5 for row in range(len(computed))], schedule.regions, fontsize=7)
        below.invert_yaxis()
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw digits with plain torch.compile and with moeca.")
    parser.add_argument("--json", action="store_true", help="print the figures as one line of JSON")
    parser.add_argument("--runs", type=int, default=8, help=f"runs of {BATCH} digits for each (default 8)")
    parser.add_argument(
        "--steps", type=int, default=50, help="denoising steps of a run; weights are fitted for 50 (default)"
    )
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="where the picture goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(stderr=args.json)
    found = contenders(args.steps, console)
    figures, samples = compare(found, args.runs, args.steps, console), args.runs * BATCH
    draw(found, args.steps, args.picture)
    if args.json:
        told = {name: asdict(one) for name, one in figures.items()}
        print(json.dumps({"samples": samples, "steps": args.steps, "contenders": told}))
    else:
        print_table(figures, samples, args.steps, console)
    console.print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
