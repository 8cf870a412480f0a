"""Draw digits with plain torch.compile and with moeca, and show what mending the graph and caching each save and cost.

    python -m examples.01_generate            # a table, and demo.png
    python -m examples.01_generate --json     # the figures as one line of JSON

The model as shipped breaks its graph at every dispatch of tokens to experts. `moeca.prepare` rewrites these; the second
contender is plain torch.compile of the rewritten model, so that its speedup is that of the whole graph alone. The
sampler is the same. Runs alternate, compile time is apart, figures are medians. The schedule was calibrated by
`examples.03_calibrate` on other seeds than these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import moeca_compile as moeca
from examples import digits
from moeca_compile.schedule import Action, Schedule

SCHEDULE = Path(__file__).parent / "schedules" / "digits_34.json"
BATCH = 32  # digits a run; with guidance the model sees twice as many
FIRST_SEED = 2000


@dataclass(frozen=True)
class Figures:
    """What one comparison found; seconds are medians of one run of `BATCH` digits, speedups are ratios of these.

    Attributes:
        speedup: of moeca over torch.compile of the model as shipped.
        speedup_prepared: of torch.compile of the prepared model over the same.
        speedup_caching: of moeca over torch.compile of the prepared model.
    """

    speedup: float
    speedup_prepared: float
    speedup_caching: float
    mac_fraction: float
    psnr_db: float
    state_bytes: int
    seconds_uncached: float
    seconds_prepared: float
    seconds_cached: float
    compile_seconds_uncached: float
    compile_seconds_prepared: float
    compile_seconds_cached: float
    samples: int
    steps: int


class Contender:
    """A compiled model, and the digits and seconds it has made so far; its runs use seeds one after another."""

    def __init__(self, model: Any, warm_up: Callable[..., object], steps: int) -> None:
        self.model, self.steps = model, steps
        self.images: list[Tensor] = []
        self.seconds: list[float] = []
        started = time.perf_counter()
        with torch.no_grad():
            warm_up(model, *example_inputs())
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


def compare(runs: int, steps: int, console: Console) -> tuple[Figures, Contender, Contender]:
    """Compile all, then sample with one after the other, `runs` times."""

    def call(model: Any, *inputs: Tensor) -> object:
        return model(*inputs)

    with console.status("compiling: plain torch.compile"):
        plain = Contender(torch.compile(digits.load_model()), call, steps)
    with console.status("compiling: plain torch.compile of the prepared model"):
        prepared_model = digits.load_model()
        moeca.prepare(prepared_model)
        prepared = Contender(torch.compile(prepared_model), call, steps)
    with console.status("compiling: moeca"):
        model = torch.compile(digits.load_model(), backend="moeca", options={"schedule": SCHEDULE})
        cached = Contender(model, moeca.warmup, steps)
    with Progress(console=console) as progress:
        task = progress.add_task("sampling", total=3 * runs * steps)
        for _ in range(runs):
            for contender in (plain, prepared, cached):
                contender.run(lambda step, x: progress.advance(task))
    stats = moeca.stats(cached.model)
    figures = Figures(
        speedup=plain.median_seconds / cached.median_seconds,
        speedup_prepared=plain.median_seconds / prepared.median_seconds,
        speedup_caching=prepared.median_seconds / cached.median_seconds,
        mac_fraction=stats.mac_fraction,
        psnr_db=digits.psnr(torch.cat(cached.images), torch.cat(plain.images)).mean().item(),
        state_bytes=stats.state_bytes,
        seconds_uncached=plain.median_seconds,
        seconds_prepared=prepared.median_seconds,
        seconds_cached=cached.median_seconds,
        compile_seconds_uncached=plain.compile_seconds,
        compile_seconds_prepared=prepared.compile_seconds,
        compile_seconds_cached=cached.compile_seconds,
        samples=runs * BATCH,
        steps=steps,
    )
    return figures, plain, cached


def print_table(figures: Figures, console: Console) -> None:
    title = f"{BATCH} digits, {figures.steps} steps, guidance 2; quality over {figures.samples} digits"
    table = Table(
        "", "torch.compile", "torch.compile, prepared", "moeca, calibrated", title=title, title_justify="left"
    )
    f = figures
    seconds = (f.seconds_uncached, f.seconds_prepared, f.seconds_cached)
    compiling = (f.compile_seconds_uncached, f.compile_seconds_prepared, f.compile_seconds_cached)
    table.add_row("seconds", *(f"{each:.2f}" for each in seconds))
    table.add_row("speedup", "1", f"{f.speedup_prepared:.2f}", f"{f.speedup:.2f}")
    table.add_row("speedup by caching alone", "", "1", f"{f.speedup_caching:.2f}")
    table.add_row("share of the MACs", "100 %", "100 %", f"{f.mac_fraction:.1%}")
    table.add_row("PSNR against uncached", "", "", f"{f.psnr_db:.1f} dB")
    table.add_row("cached state", "", "", f"{f.state_bytes / 1e6:.1f} MB")
    table.add_row("compile seconds, once", *(f"{each:.1f}" for each in compiling))
    console.print(table)
    console.print("seconds: medians of runs that take turns; a speedup is the ratio of two of them")


def draw(uncached: Tensor, cached: Tensor, regions: Sequence[str], steps: int, path: Path) -> None:
    """One picture: both rows of digits (N,1,16,16), and the schedule, regions x steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    schedule = Schedule.load(SCHEDULE)
    times = [1000.0 * (1 - step / steps) for step in range(steps)]
    rows = [schedule.rows[schedule.row_index(step, times[step]) or 0] for step in range(steps)]
    computed = [[row[column] is Action.COMPUTE for row in rows] for column in range(len(regions))]
    figure, (top, middle, bottom) = pyplot.subplots(
        3, 1, figsize=(12, 6), height_ratios=(1, 1, 1.6), layout="constrained"
    )
    for axes, images, title in ((top, uncached, "plain torch.compile"), (middle, cached, "moeca, calibrated")):
        axes.imshow(torch.cat(list(images[:10, 0]), dim=1).clamp(-1, 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes.set_title(title, loc="left")
        axes.axis("off")
    bottom.pcolormesh(computed, cmap=ListedColormap(["#e8e8e8", "#27598c"]), edgecolors="white", linewidth=0.5)
    bottom.set_title("what each step computes (dark) and forecasts (light)", loc="left")
    bottom.set_yticks([row + 0.5 for row in range(len(regions))], regions, fontsize=7)
    bottom.set_xlabel("step")
    bottom.invert_yaxis()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw digits with plain torch.compile and with moeca.")
    parser.add_argument("--json", action="store_true", help="print the figures as one line of JSON")
    parser.add_argument("--runs", type=int, default=8, help=f"runs of {BATCH} digits for each (default 8)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of a run (default 50)")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="where the picture goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(stderr=args.json)
    figures, plain, cached = compare(args.runs, args.steps, console)
    regions = [region.key for region in moeca.explain(cached.model, *example_inputs()).regions]
    draw(plain.images[0], cached.images[0], regions, args.steps, args.picture)
    if args.json:
        print(json.dumps(asdict(figures)))
    else:
        print_table(figures, console)
    console.print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
