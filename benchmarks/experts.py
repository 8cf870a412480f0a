"""Milliseconds of `moeca::experts` over the number of experts, while tokens choose among the same eight of them.

    python -m benchmarks.experts    # a minute

Each expert is a gated MLP of 256 channels and 64 hidden ones, in float32, for 256 tokens. *chosen*: tokens choose two
of the first eight, whatever the number of experts. *spread*: they choose two of all. *12 heads*: twelve slices of the
channels with experts of their own, as rows of one dispatch; tokens choose six. One thread; the contenders take turns;
medians over the rounds, and the smallest and largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moeca_compile.ops.experts import segments

TOKENS, WIDTH, HIDDEN, ROUNDS = 256, 256, 64, 30
COUNTS = (8, 32, 128, 256)


def call_of(experts: int, chosen: int, top_k: int, tokens: int = TOKENS, width: int = WIDTH) -> Callable[[], Tensor]:
    """A call of the operator whose tokens choose `top_k` of the first `chosen` experts."""
    made = torch.Generator().manual_seed(0)
    weights = [
        [torch.randn(shape, generator=made) * 0.05 for _ in range(experts)]
        for shape in ((HIDDEN, width), (width, HIDDEN), (HIDDEN, width))
    ]
    x = torch.randn(tokens, width, generator=made)
    ids = torch.rand(tokens, chosen, generator=made).topk(top_k).indices
    up, down, gate = weights
    return lambda: segments(x, ids, up, down, gate, [], [], [], "silu")


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    contenders = {f"{count} experts, chosen": call_of(count, 8, 2) for count in COUNTS}
    contenders |= {f"{count} experts, spread": call_of(count, count, 2) for count in COUNTS}
    heads = 12
    for count in (8, 256):
        contenders[f"{heads} heads x {count}, 8 chosen in a head"] = _of_heads(heads, count)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for number in range(ROUNDS + 2):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                if number >= 2:
                    times[name].append(1e3 * (time.perf_counter() - start))
    table = Table("contender", "median ms", "least", "most")
    for name, values in times.items():
        table.add_row(name, *(f"{value:.2f}" for value in (statistics.median(values), min(values), max(values))))
    Console(width=100).print(table)


def _of_heads(heads: int, count: int) -> Callable[[], Tensor]:
    """Twelve heads as rows of one dispatch: head h chooses six of the first eight of its own `count` experts."""
    width = 24
    made = torch.Generator().manual_seed(0)
    total = heads * count
    up, gate = ([torch.randn(HIDDEN, width, generator=made) * 0.05 for _ in range(total)] for _ in range(2))
    down = [torch.randn(width, HIDDEN, generator=made) * 0.05 for _ in range(total)]
    x = torch.randn(TOKENS * heads, width, generator=made)
    ids = torch.rand(TOKENS * heads, 8, generator=made).topk(6).indices
    ids = ids + (torch.arange(TOKENS * heads) % heads * count)[:, None]
    return lambda: segments(x, ids, up, down, gate, [], [], [], "silu")


if __name__ == "__main__":
    main()
