"""Copies of what `moeca_compile.compile` gave: each is compiled as the original was, and has state of its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import StateError
from moeca_compile.expert_dispatch.isolate import isolate

TIMES = tuple(900.0 - 100 * step for step in range(7))
Copy = Callable[[Any], Any]


class Guided(nn.Module):
    """x (B, 4, 16), t (B,) -> (B, 4, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.time = nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(8) / 2.0)
        gate = self.time(torch.cat([angles.cos(), angles.sin()], -1))[:, None]
        return x + gate * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))

    def forward_with_cfg(self, x: Tensor, t: Tensor) -> Tensor:
        return 2 * self.forward(x, t)


class Copying(Guided):
    """A model that copies itself."""

    def __deepcopy__(self, memo: object) -> Copying:
        return pickled(self)


def pickled(handle: Any) -> Any:
    return pickle.loads(pickle.dumps(handle))


def model(cls: type[Guided] = Guided, seed: int = 0) -> Guided:
    torch.manual_seed(seed)
    return cls().eval().requires_grad_(False)


def compiled(plain: Any, granularity: str = "region") -> Any:
    return moeca.compile(plain, schedule="uniform:3", granularity=granularity, inner="eager")


def noise(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(seed))


def sample(*models: Any, seed: int = 0) -> Tensor:
    """A loop in which the models follow one another."""
    x = noise(seed)
    with torch.no_grad():
        for step, time in enumerate(TIMES):
            called = models[step * len(models) // len(TIMES)]
            x = x - called.forward_with_cfg(x, torch.full((2,), time)) / 20
    return x


def variants(handle: Any) -> list[str]:
    return [record.variant for record in moeca.stats(handle).steps]


@pytest.mark.parametrize("granularity", ["region", "output"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_methods_of_a_copy_are_cached_with_its_own_weights(copied: Copy, granularity: str) -> None:
    handle = compiled(model(), granularity)
    before = sample(handle)
    twin = copied(handle)
    assert torch.equal(sample(twin), before)
    assert variants(twin) == variants(handle) == ["v0", "v1", "v1", "v0", "v1", "v1", "v0"]
    if copied is copy.copy:
        assert twin._orig_mod is handle._orig_mod
        return
    twin.down.weight.mul_(2)
    assert not torch.equal(sample(twin), before)
    assert torch.equal(sample(handle), before)


@pytest.mark.parametrize("granularity", ["region", "output"])
def test_a_shallow_copy_and_its_original_take_turns(granularity: str) -> None:
    handle = compiled(model(), granularity)
    alone = [sample(handle, seed=seed) for seed in (0, 1)]
    xs = [noise(0), noise(1)]
    models = handle, copy.copy(handle)
    with torch.no_grad():
        for time in TIMES:
            for i, called in enumerate(models):
                xs[i] = xs[i] - called.forward_with_cfg(xs[i], torch.full((2,), time)) / 20
    assert [*map(torch.equal, xs, alone)] == [True, True]


def test_a_model_that_copies_itself_is_compiled_too() -> None:
    handle = compiled(model(Copying))
    assert torch.equal(sample(copy.deepcopy(handle)), sample(handle))
    assert variants(copy.deepcopy(handle)) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_two_models_are_one_loop_of_their_own(copied: Copy) -> None:
    pair = compiled([model(), model(seed=1)])
    with moeca.trajectory(pair):
        image = sample(*pair)
    twins = copied(pair)
    assert variants(twins) == []
    with moeca.trajectory(twins):
        assert torch.equal(sample(*twins), image)
    assert variants(twins[1]) == variants(pair)
    assert len(variants(pair)) == len(TIMES)


def test_a_deep_copy_has_a_forward_of_its_own() -> None:
    """Else the graphs of all copies count against one limit of Dynamo."""
    handle = compiled(model())
    twins = [copy.deepcopy(handle), compiled(copy.deepcopy(handle._orig_mod))]
    codes = {id(module._orig_mod.forward.__code__) for module in (handle, *twins)}
    assert len(codes) == 3
    assert not isolate(handle._orig_mod)


def test_a_model_without_its_weights_is_not_copied() -> None:
    handle = moeca.compile(model(), schedule="uniform:3", inner="eager", free_hoisted="drop")
    for _ in range(2):
        with moeca.trajectory(handle, timesteps=TIMES):
            sample(handle)
    with pytest.raises(StateError, match=r"was dropped, so the model has no state dict, and can't be compiled"):
        copy.deepcopy(handle)
