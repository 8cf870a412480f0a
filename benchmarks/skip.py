"""What long skips buy: the digits of a DiT with and without them, when the blocks between the ends are cached.

    python -m benchmarks.skip            # both committed models, about 10 minutes on one core; writes results/skip.json
    python -m benchmarks.skip --quick    # few digits and steps: does it run?

The span is blocks s..L-s-1 in every case. What may be kept of it: its value, x entering block L-s (Skip-Cache), or its
change, that x less the x that entered block s. A reuse step copies it or, at order 1, extrapolates it linearly. Quality
is PSNR against the same model's own uncached digits; "fewer steps" spends the same MACs on an uncached run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moeca_compile as moeca
from benchmarks.protocol import RESULTS, pin_threads, save
from examples import digits, skip_dit
from examples.skip_dit import SkipCache

MODELS = ("skip", "plain")
VALUE, CHANGE, FEWER = "value", "change", "fewer steps"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    kept: tuple[int, ...]  # s
    intervals: tuple[int, ...]
    seeds: tuple[int, ...]
    digits: int  # a seed
    steps: int


WHOLE = Size(kept=(1, 2), intervals=(2, 3, 4, 5), seeds=(0, 1, 2, 3), digits=10, steps=50)
QUICK = Size(kept=(1,), intervals=(2,), seeds=(0,), digits=4, steps=6)


@dataclass(frozen=True)
class Way:
    """One way to spend less: what is kept of the span, and the order of its forecast (0 copies)."""

    model: str
    keeps: str
    order: int = 0


WAYS = tuple(
    Way(model, keeps, order)
    for model in MODELS
    for keeps, order in ((VALUE, 0), (VALUE, 1), (CHANGE, 0), (CHANGE, 1), (FEWER, 0))
    if (model, keeps, order) != ("plain", VALUE, 1)  # no granularity of moeca: there is no long skip
)


@dataclass(frozen=True)
class Result:
    """Of one way: its share of the uncached run's MACs, PSNR in dB (mean over the digits), class accuracy."""

    model: str
    keeps: str
    order: int
    kept_blocks: int
    interval: int
    mac_fraction: float
    psnr_db: float
    class_accuracy: float


class Bench:
    """One trained model and the digits that it makes uncached."""

    def __init__(self, name: str, size: Size) -> None:
        self.size = size
        self.model = skip_dit.load_digits(skips=name == "skip").requires_grad_(False)
        self.uncached = self.draw(lambda: self.model)

    def draw(self, fresh: Callable[[], Any], steps: int | None = None) -> Tensor:
        """The digits of all seeds; `fresh` gives the model, or a loop around it, with nothing cached."""
        n, steps = self.size.digits, steps or self.size.steps
        return torch.cat([digits.sample(fresh(), seed=seed, n=n, steps=steps) for seed in self.size.seeds])

    def result(self, way: Way, kept: int, interval: int) -> Result:
        images, macs = self.run(way, kept, interval)
        psnr = digits.psnr(images, self.uncached).mean().item()
        return Result(**asdict(way), kept_blocks=kept, interval=interval, mac_fraction=round(macs, 4),
                      psnr_db=round(psnr, 2), class_accuracy=self.accuracy(images))  # fmt: skip

    def run(self, way: Way, kept: int, interval: int) -> tuple[Tensor, float]:
        """The digits, and the share of the MACs."""
        if way.keeps == FEWER:
            steps = round(self.size.steps * self.share(kept, interval))
            return self.draw(lambda: self.model, steps), steps / self.size.steps
        if way.keeps == VALUE and way.order == 0:
            return self.draw(lambda: SkipCache(self.model, kept, interval)), self.share(kept, interval)
        span = f"skip:{kept}" if way.keeps == VALUE else f"blocks:{kept}:-{kept}"
        options = {"schedule": f"uniform:{interval}", "order": way.order, "granularity": span, "inner": "eager"}
        torch._dynamo.reset()  # one model under more than eight options would meet Dynamo's recompile limit: eager
        cached = moeca.compile(self.model, **options)
        images = self.draw(lambda: cached)
        return images, moeca.stats(cached).mac_fraction

    def accuracy(self, images: Tensor) -> float:
        labels = digits.labels_of(self.size.digits).repeat(len(self.size.seeds))
        return round(digits.accuracy(images, labels), 4)

    def share(self, kept: int, interval: int) -> float:
        """MACs under Skip-Cache over those uncached, as counted on one refresh and one reuse step."""
        loop = SkipCache(self.model, kept, interval)
        spent = []
        for t in (1000.0, 980.0):
            # Fused attention has no entry in the counter on a CPU; its plain form is two matrix products.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                loop(digits.initial_noise(0, 2), torch.full((2,), t), digits.labels_of(2))
            spent.append(counter.get_total_flops())
        refreshes = -(-self.size.steps // interval)
        return (refreshes + (self.size.steps - refreshes) * spent[1] / spent[0]) / self.size.steps


def measure(size: Size, console: Console) -> tuple[dict[str, float], list[Result]]:
    """The class accuracy of each model's uncached digits, and the results of all ways."""
    accuracy, results = {}, []
    spans = [(kept, interval) for kept in size.kept for interval in size.intervals]
    with Progress(console=console) as progress:
        task = progress.add_task("sampling", total=len(spans) * len(WAYS))
        for name in MODELS:
            bench = Bench(name, size)
            accuracy[name] = bench.accuracy(bench.uncached)
            for way, (kept, interval) in itertools.product((w for w in WAYS if w.model == name), spans):
                results.append(bench.result(way, kept, interval))
                progress.advance(task)
    return accuracy, results


def print_table(results: Sequence[Result], console: Console) -> None:
    """One line a way; a column a span and interval: PSNR, and below it the share of the MACs."""
    found = {(Way(r.model, r.keeps, r.order), (r.kept_blocks, r.interval)): r for r in results}
    spans = dict.fromkeys((r.kept_blocks, r.interval) for r in results)
    table = Table("model, kept", title="PSNR in dB at a share of the MACs; s/interval", title_justify="left")
    for kept, interval in spans:
        table.add_column(f"{kept}/{interval}", justify="right")
    for way in WAYS:
        how = "" if way.keeps == FEWER else ", order 1" if way.order else ", copy"
        cells = [found[way, span] for span in spans]
        table.add_row(f"{way.model}, {way.keeps}{how}", *(f"{r.psnr_db:.1f}\n{r.mac_fraction:.0%}" for r in cells))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Cached spans in a DiT with and without long skips.")
    parser.add_argument("--quick", action="store_true", help="one span and interval, four digits, six steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for skip.json")
    args = parser.parse_args(argv)
    pin_threads()
    console = Console()
    size = QUICK if args.quick else WHOLE
    accuracy, results = measure(size, console)
    print_table(results, console)
    console.print("class accuracy, uncached: " + ", ".join(f"{name} {value:.1%}" for name, value in accuracy.items()))
    payload = {"size": asdict(size), "uncached_class_accuracy": accuracy, "results": [asdict(r) for r in results]}
    console.print(f"written: {save('skip', payload, args.out)}")


if __name__ == "__main__":
    main()
