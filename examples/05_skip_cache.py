"""Skip-Cache on a Skip-DiT, written by hand and as one option of moeca: the same digits, bit by bit.

    python -m examples.05_skip_cache                     # the model's own ops, one by one, for all: about half a minute
    python -m examples.05_skip_cache --inner inductor    # moeca's programs and the uncached model compiled

The model (examples/skip_dit.py) has long skips from its first blocks to its last. Between the ends of one of them lies
a span: `granularity="skip:1"` makes it the one thing to cache. Here s = 1 and every third step is a refresh.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moeca_compile as moeca
from examples import digits, skip_dit
from examples.skip_dit import SkipDiT

KEPT, INTERVAL = 1, 3
UNCACHED, BY_HAND = "uncached", "Skip-Cache by hand"
COPY, FORECAST = "moeca skip:1, order 0", "moeca skip:1, order 1"


@dataclass(frozen=True)
class Run:
    """One run: its digits (N,1,16,16), its seconds, its share of the uncached run's MACs."""

    images: Tensor
    seconds: float
    mac_fraction: float


def timed(draw: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    return draw(), time.perf_counter() - started


def with_moeca(model: SkipDiT, order: int, inner: str, n: int, steps: int) -> Run:
    """The model compiled with its span as the only region; the sampler doesn't change."""
    cached = moeca.compile(model, schedule=f"uniform:{INTERVAL}", order=order, granularity=f"skip:{KEPT}", inner=inner)
    moeca.warmup(cached, *example_inputs(n))
    images, seconds = timed(lambda: digits.sample(cached, seed=0, n=n, steps=steps))
    return Run(images, seconds, moeca.stats(cached).mac_fraction)


def compare(n: int, steps: int, inner: str) -> dict[str, Run]:
    """The same n digits in four ways."""
    model = skip_dit.load_digits(skips=True).requires_grad_(False)
    plain = model if inner == "eager" else torch.compile(model)
    plain(*example_inputs(n))
    uncached = Run(*timed(lambda: digits.sample(plain, seed=0, n=n, steps=steps)), mac_fraction=1.0)
    copy, forecast = (with_moeca(model, order, inner, n, steps) for order in (0, 1))
    loop = timed(lambda: skip_dit.skip_cache_sample(model, KEPT, INTERVAL, seed=0, n=n, steps=steps))
    by_hand = Run(*loop, mac_fraction=copy.mac_fraction)  # the same blocks run
    return {UNCACHED: uncached, BY_HAND: by_hand, COPY: copy, FORECAST: forecast}


def example_inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """One call of the sampler: conditional half, then unconditional."""
    noise, labels = digits.initial_noise(seed=0, n=n), digits.labels_of(n)
    t = torch.full((2 * n,), 1000.0)
    return torch.cat([noise, noise]), t, torch.cat([labels, torch.full_like(labels, digits.CLASSES)])


def print_table(runs: dict[str, Run], steps: int, console: Console) -> None:
    reference = runs[UNCACHED].images
    labels = digits.labels_of(len(reference))
    title = f"{len(reference)} digits, {steps} steps, guidance 2; one step in {INTERVAL} is whole"
    table = Table("", "seconds", "MACs", "PSNR", "class accuracy", title=title, title_justify="left")
    for name, run in runs.items():
        psnr = "" if run.images is reference else f"{digits.psnr(run.images, reference).mean():.1f} dB"
        accuracy = f"{digits.accuracy(run.images, labels):.1%}"
        table.add_row(name, f"{run.seconds:.2f}", f"{run.mac_fraction:.1%}", psnr, accuracy)
    console.print(table)
    difference = (runs[COPY].images - runs[BY_HAND].images).abs().max().item()
    console.print(f"largest difference of moeca's copy to the loop by hand: {difference:g}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Skip-Cache by hand and with moeca.")
    parser.add_argument("--digits", type=int, default=32, help="how many (default 32)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="eager", help="what runs the programs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print_table(compare(args.digits, args.steps, args.inner), args.steps, Console())


if __name__ == "__main__":
    main()
