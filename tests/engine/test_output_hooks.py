"""granularity='output' of models whose weights are replaced by hooks while they run: offloading, casts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import accelerate
import diffusers.hooks
import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from tests.engine.test_output import STEPS, Model, compiled


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def cast(model: nn.Module) -> None:
    diffusers.hooks.apply_layerwise_casting(model, torch.bfloat16, torch.float32)


def step_of(handle: Any, step: int) -> Tensor:
    return handle(torch.ones(2, 2, 3, 3), torch.full((2,), 1.0 - step / STEPS), torch.tensor([1, 2]))


@pytest.mark.parametrize(("hook", "streams"), [(offload, 2), (cast, 0)])
def test_weights_that_hooks_replace_in_a_call_are_the_same_model(
    model: Model, hook: Callable[[nn.Module], None], streams: int
) -> None:
    hook(model)
    handle = compiled(model, "uniform:3")
    loops = [moeca.trajectory(handle, steps=STEPS, stream=str(number)) for number in range(streams)]
    for step in range(STEPS):
        for loop in loops or [nullcontext()]:  # loops that take turns, each in a trajectory of its own
            with loop:
                step_of(handle, step)
    assert model.calls == max(streams, 1) * 3
    assert "9 calls (3 x v0, 6 x v1, 0 cold)" in str(moeca.stats(handle))


def test_weights_that_are_changed_between_calls_are_another_model(model: Model) -> None:
    cast(model)
    handle = compiled(model, "uniform:3")
    for step in range(2):
        step_of(handle, step)
    with torch.no_grad():
        model.mix.weight.mul_(2)
        step_of(handle, 2)
    assert model.calls == 2
    assert "1 cold" in str(moeca.stats(handle))


class Rebuilding(nn.Module):
    """Replaces a buffer of its own at one of its calls, as a cache that is rebuilt."""

    def __init__(self, at: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(4, 4)
        self.register_buffer("kept", torch.zeros(4))
        self.calls, self.at = 0, at

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.kept = torch.zeros(4)
        return self.mix(x) + self.kept


def ran(at: int) -> tuple[list[int], Tensor]:
    """Calls of the model after each of 30 steps, and the last latent."""
    model, x, counts = Rebuilding(at), torch.ones(1, 4), []
    handle = moeca.compile(model, schedule="uniform:2", inner="eager", granularity="output")
    with torch.no_grad():
        for step in range(30):
            x = x - 0.01 * handle(x, timestep=torch.tensor([30.0 - step]))
            counts.append(model.calls)
    return counts, x


@pytest.mark.parametrize("at", [2, 8, 11])
def test_a_buffer_that_the_model_replaces_while_it_runs_drops_nothing(at: int) -> None:
    (counts, x), (others, y) = ran(at), ran(0)
    assert counts == others
    assert torch.equal(x, y)
