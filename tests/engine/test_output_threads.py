"""A handle of granularity `output` in several threads at once."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile as moeca


class Flow(nn.Module):
    """x (B, 4), t (B,) -> (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(5, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.mix(torch.cat([x, t[:, None] / 1000], 1)))


def handle_of(model: nn.Module) -> Any:
    return moeca.compile(model.eval(), schedule="uniform:3", granularity="output", inner="eager")


def loop(model: Any, seed: int = 0) -> Tensor:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), moeca.trajectory(model):
        for step in range(7):
            x = x - model(x, torch.full((2,), 900.0 - 100 * step)) / 20
    return x


def test_first_calls_of_several_threads_are_those_of_one() -> None:
    """Each would make a program of its own, and the last one's would take the place of the others' in mid-loop."""
    alone, handle, found = handle_of(Flow()), handle_of(Flow()), dict[int, Tensor]()
    start = threading.Barrier(4)

    def run(seed: int) -> None:
        start.wait()
        found[seed] = loop(handle, seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], loop(alone, seed)) for seed in range(4))
