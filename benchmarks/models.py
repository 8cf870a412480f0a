"""What is measured: DiT-MoE-S/2-8E2A with random weights, 256 tokens, batch 2, and how a sampler calls it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from examples.dit_moe import dit_moe, randomize_
from moeca_compile.schedule import Action, Schedule

CONFIG = "S/2-8E2A"
DEPTH = 12
BATCH = 2
STEPS = 50
FIRST_TIMESTEP = 1000.0

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def network(depth: int = DEPTH) -> nn.Module:
    """The network as shipped, on the CPU, float32, eval, seeded random weights."""
    torch.manual_seed(0)
    return randomize_(dit_moe(CONFIG, depth=depth)).eval().requires_grad_(False)


def example_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N,4,32,32), timesteps (N,), labels (N,): a conditional and an unconditional sample."""
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).repeat(BATCH, 1, 1, 1)
    return x, torch.full((BATCH,), FIRST_TIMESTEP), torch.tensor([207, 1000])


def timesteps(steps: int = STEPS) -> list[float]:
    """Those of a trajectory, as float32 has them."""
    return [float(torch.tensor(FIRST_TIMESTEP * (1 - step / steps))) for step in range(steps)]


def walk(model: Model, steps: int = STEPS, moved: AbstractContextManager[Any] | None = None) -> Iterator[Tensor]:
    """A trajectory step by step, x moved along the predicted velocity; `moved` is entered around each call."""
    x, _, labels = example_inputs()
    for timestep in timesteps(steps):
        with moved or nullcontext():
            velocity = model(x, torch.full((BATCH,), timestep), labels)[:, : x.shape[1]]
        x = x - velocity / steps
        yield x


def euler(model: Model, steps: int = STEPS) -> Tensor:
    """A whole trajectory."""
    (last,) = deque(walk(model, steps), maxlen=1)
    return last


class Walker:
    """One endless trajectory under an open-ended schedule, taken step by step so that a kind of step can be timed."""

    def __init__(self, model: Any, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        self.x, self.t, self.labels = example_inputs()
        self.taken = 0

    def step(self) -> Tensor:
        self.taken += 1
        self.t = self.t * 0.999
        return self.model(self.x, self.t, self.labels)

    def walk_to(self, action: Action) -> None:
        """Take steps until the next one has `action`."""
        while self.next_action() is not action:
            self.step()

    def next_action(self) -> Action:
        row = self.schedule.row_index(self.taken)
        assert row is not None, "the schedule ends"
        return self.schedule.rows[row][0]
