"""Samplers whose steps were placed offline, by quality alone: no time is told, so the machine's load changes nothing.

    python -m benchmarks.peers.searched            # 64 held-out digits; writes results/peers_searched.json
    python -m benchmarks.peers.searched --quick    # few steps and digits: does it run?

Steps and weights are chosen on seeds 0 to 15, two digits each, and told on other ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.paired import interval, paired, psnr, worst
from benchmarks.peers import multistep
from benchmarks.peers.multistep import Guided, Multistep, euler_sum, integral
from benchmarks.protocol import arguments, folder_of, pin_threads, save
from benchmarks.schedules import GUIDANCE, labels_of
from examples import digits
from moeca_compile import prepare

STEPS, FINER = 50, 4
SEARCH = (range(16), 2)  # seeds, and digits a seed
TOLD = (range(70_000, 70_002), 32)
COUNTS = (17, 10, 25, 13)


def drawn(seeds: Sequence[int], each: int) -> tuple[Tensor, Tensor]:
    """Noise and labels."""
    noise = torch.cat([digits.initial_noise(seed, each) for seed in seeds])
    return noise, torch.cat([labels_of(seed, each) for seed in seeds])


def guided_of(model: Callable[..., Tensor], labels: Tensor) -> Guided:
    both = torch.cat([labels, torch.full_like(labels, digits.CLASSES)])

    def guided(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        cond, uncond = model(torch.cat([x, x]), torch.full((2 * len(x),), 1000.0 * t), both).chunk(2)
        return uncond + GUIDANCE * (cond - uncond), cond - uncond

    return guided


def recorded(guided: Guided, x: Tensor, steps: int, order: int) -> tuple[list[Tensor], list[Tensor]]:
    """States before each step and after the last, and outputs, of a run that computes every step."""
    rule = multistep.polynomial(range(steps), steps, order, integral)
    states, outputs = [x], []

    def recording(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        output, difference = guided(x, t)
        states.append(x)
        outputs.append(output)
        return output, difference

    last = rule.sample(recording, x)
    return [*states[1:], last], outputs


def gram_of(outputs: Sequence[Tensor]) -> np.ndarray:
    flat = torch.stack([one.flatten() for one in outputs]).double()
    gram: np.ndarray = (flat @ flat.T).numpy()
    return gram


class Search:
    """What is recorded on the search digits, and what is chosen by it."""

    def __init__(self, model: Callable[..., Tensor], seeds: Sequence[int], each: int, steps: int, finer: int) -> None:
        self.steps, self.finer = steps, finer
        x, labels = drawn(seeds, each)
        self.guided = guided_of(model, labels)
        self.uncached, outputs = recorded(self.guided, x, steps, 0)
        converged, fine = recorded(self.guided, x, finer * steps, 1)
        self.converged = converged[::finer]
        self.gram, self.fine_gram = gram_of(outputs), gram_of(fine)

    def contenders(self, count: int) -> Iterator[tuple[str, Multistep]]:
        steps, fine = self.steps, self.steps * self.finer
        even = [round(index * fine / count) for index in range(count)]
        yield "Adams-Bashforth 2, even times", multistep.polynomial(even, fine, 1, integral)
        for order in (1, 2):
            at = multistep.place(self.fine_gram, count, order, integral)
            name = f"Adams-Bashforth {order + 1}, placed times"
            yield name, multistep.polynomial(at, fine, order, integral)
        at = multistep.place(self.gram, count, 2, euler_sum)
        yield "calibrated multistep, polynomial", multistep.polynomial(at, steps, 2, euler_sum)
        for truth, states in {"uncached": self.uncached, "converged": self.converged}.items():
            yield f"calibrated multistep, fitted to {truth}", multistep.fitted(at, self.guided, states)


def measure(search: Search, guided: Guided, x: Tensor, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The rows of the result. A lead is over the uncached run, to the converged solution."""
    truths = {
        "uncached": recorded(guided, x, search.steps, 0)[0][-1],
        "converged": recorded(guided, x, search.steps * search.finer, 1)[0][-1],
    }
    own = psnr(truths["uncached"], truths["converged"])
    for count in counts:
        for name, rule in search.contenders(count):
            images = rule.sample(guided, x)
            levels = {truth: psnr(images, exact) for truth, exact in truths.items()}
            yield {
                "name": name,
                "evaluations": count,
                "at": [round(step * search.steps / rule.steps, 3) for step in rule.at],
                "psnr_db": {truth: [round(one, 3) for one in interval(level)] for truth, level in levels.items()},
                "worst_5_percent_db": {truth: round(worst(level), 3) for truth, level in levels.items()},
                "lead_over_uncached_db": [round(one, 3) for one in paired(levels["converged"], own)],
                "psnr_db_by_digit": {truth: [round(one, 2) for one in level] for truth, level in levels.items()},
            }


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments("Samplers whose steps were placed offline.", "few images and steps").parse_args(argv)
    pin_threads()
    console, out = Console(width=140), folder_of(args)
    network = digits.load_model().requires_grad_(False)
    prepare(network)
    if args.quick:
        search, told, counts = Search(network, range(2), 1, 8, 2), (range(70_000, 70_001), 2), (4,)
    else:
        search, told, counts = Search(network, *SEARCH, STEPS, FINER), TOLD, COUNTS
    x, labels = drawn(*told)
    rows: list[dict[str, Any]] = []
    for row in measure(search, guided_of(network, labels), x, counts):
        rows.append(row)
        console.print({name: row[name] for name in row if name not in ("at", "psnr_db_by_digit")}, highlight=False)
        if out:
            save("peers_searched", {"digits": len(x), "steps": search.steps, "rows": rows}, out)


if __name__ == "__main__":
    main()
