"""`dynamic=True`: which sizes Dynamo's symbols leave free, and one compile a variant for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.frontend.symbols.other_size import _moved
from tests.compiles import in_place_of_inductor, traces
from tests.models import DiT
from tests.sampling import TIMES, cfg_calls, plain

H, W, T, B = sympy.symbols("h w t b", positive=True, integer=True)
ANY = dict.fromkeys((H, W, T, B))


@pytest.mark.parametrize(
    ("found", "guards"),
    [
        ({H: 8}, []),
        ({H: 8}, [sympy.Eq(sympy.Mod(H, 8), 0)]),
        ({H: 8, W: 8}, [sympy.Eq(sympy.Mod(H, 2), 0), sympy.Eq(sympy.Mod(W, 2), 0)]),
        ({H: 8, W: 8}, [sympy.Eq(H, W)]),  # an axis that two inputs have
        ({H: 8, W: 8, T: 8}, [sympy.Eq(H, W), sympy.Eq(W, T)]),  # or three
        ({T: 64, B: 6, H: 64, W: 6}, [sympy.Eq(T + B, H + W)]),  # ids of an image's and of a prompt's tokens
        ({H: 4, W: 6, T: 24}, [sympy.Eq(H * W, T)]),  # edges and tokens
        ({H: 30}, [H <= 32]),
    ],
)
def test_sizes_that_guards_allow(found: dict[sympy.Symbol, int], guards: list[Any]) -> None:
    moved = _moved(found, guards, ANY)
    assert all(moved[symbol] != size for symbol, size in found.items())
    assert all(guard.subs(moved) == True for guard in guards)  # noqa: E712 (sympy's true)
    assert min(moved.values()) > 1


def test_no_size_seems_to_follow_from_another() -> None:
    found = {H: 32, W: 32, T: 77, B: 2}
    moved = _moved(found, [], ANY)
    changes = [moved[symbol] - size for symbol, size in found.items()]
    assert len({abs(change) for change in changes}) == len(found)
    assert len({moved[symbol] / size for symbol, size in found.items()}) == len(found)


def test_a_fixed_size_stays_and_the_others_move() -> None:
    moved = _moved({H: 8, T: 6}, [sympy.Eq(H, 8)], ANY)
    assert moved[H] == 8
    assert moved[T] != 6


def test_the_largest_size_is_not_tried() -> None:
    """A model that takes the middle of a table takes all of it there, and leaves a slice out."""
    limit = 8 + 16 * 7
    assert _moved({H: 8}, [limit >= H], ANY)[H] < limit


def test_a_range_is_kept() -> None:
    assert 4 <= _moved({H: 8}, [], {H: range(4, 13)})[H] <= 12


class Joint(nn.Module):
    """An attention block over the tokens of an image and of a prompt; width 8, as many as the prompt has tokens."""

    def __init__(self, by_size: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.time, self.project, self.out = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.by_size = nn.Linear(8, 16), nn.Linear(16, 8), by_size

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(4.0))
        gate = self.time(torch.cat([angles.sin(), angles.cos()], -1))[:, None]
        both = torch.cat([text, x], 1)
        q, k, v = self.project(both).view(*both.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        both = both + gate * self.out(attended.transpose(1, 2).flatten(2))
        both = both + gate * self.down(nn.functional.gelu(self.up(both)))
        return self.by_size(both[:, text.shape[1] :])


def joint(by_size: Callable[[Tensor], Tensor] = lambda x: x) -> Joint:
    torch.manual_seed(0)
    return Joint(by_size).eval().requires_grad_(False)


def calls(model: Any, batch: int, tokens: int, text: int, steps: int = 4) -> list[Tensor]:
    draw, found = torch.Generator().manual_seed(0), list[Tensor]()
    x, prompt = torch.randn(batch, tokens, 8, generator=draw), torch.randn(batch, text, 8, generator=draw)
    for step in range(steps):
        found.append(model(x, torch.full((batch,), 900.0 - 80 * step), prompt))
        x = x - 0.1 * found[-1]
    return found


EIGHT = [(2, 16, 8), (2, 36, 8), (2, 36, 5), (3, 25, 7), (2, 64, 12), (4, 16, 8), (2, 9, 4), (2, 16, 3)]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    torch._dynamo.utils.compilation_time_metrics.pop("_compile.compile_inner", None)
    return in_place_of_inductor(monkeypatch)


def test_the_first_size_is_compiled_for_further_ones(compiled: list[bool]) -> None:
    model = moeca.compile(joint(), schedule="full", dynamic=True)
    for size in [(2, 8, 8), (3, 25, 5)]:  # three sizes are equal at first
        torch.testing.assert_close(calls(model, *size, steps=1), calls(joint(), *size, steps=1), rtol=1e-5, atol=1e-5)
    assert compiled == [True]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["full", "uniform:3"])
def test_eight_sizes_are_one_compile_a_variant(schedule: str, compiled: list[bool]) -> None:
    model = moeca.compile(joint(), schedule=schedule, dynamic=True, max_signatures=len(EIGHT))
    by_itself = moeca.compile(joint(), schedule=schedule, inner="eager", max_signatures=len(EIGHT))
    expected = {size: calls(by_itself if schedule != "full" else joint(), *size) for size in EIGHT}
    before = traces()
    for size in EIGHT:
        torch.testing.assert_close(calls(model, *size), expected[size], rtol=1e-5, atol=1e-5)
    assert compiled == [True] * (1 if schedule == "full" else 2)
    assert traces() == before + 1
    for size in EIGHT[::-1]:  # in turns, and each a second time
        torch.testing.assert_close(calls(model, *size), expected[size], rtol=1e-5, atol=1e-5)
    assert len(compiled) == (1 if schedule == "full" else 2)
    assert moeca.stats(model).unshared == {}


@pytest.mark.slow
def test_a_batch_of_one_is_compiled_for_itself(compiled: list[bool]) -> None:
    model = moeca.compile(joint(), schedule="full", dynamic=True)
    for size in [(1, 16, 8), (1, 25, 6), (2, 16, 8), (3, 25, 6)]:
        torch.testing.assert_close(calls(model, *size), calls(joint(), *size), rtol=1e-5, atol=1e-5)
    assert compiled == [True, True]  # batch 1, any other
    assert moeca.stats(model).unshared == {}


@pytest.mark.slow
def test_other_operators_at_another_size_are_told(compiled: list[bool]) -> None:
    def by_size(x: Tensor) -> Tensor:
        return x.sin() if x.shape[1] > 20 else x.cos()

    model = moeca.compile(joint(by_size), schedule="full", dynamic=True)
    for size in [(2, 16, 8), (2, 36, 8)]:
        expected = calls(joint(by_size), *size)
        torch.testing.assert_close(calls(model, *size), expected, rtol=1e-5, atol=1e-5)
    assert compiled == [True, True]  # what Dynamo's guards keep apart


def test_a_float_that_depends_on_the_size_is_told(compiled: list[bool]) -> None:
    model = moeca.compile(joint(lambda x: x / x.shape[1] ** 0.5), schedule="full", dynamic=True)
    for size in [(2, 16, 8), (2, 36, 8)]:
        calls(model, *size)
    assert compiled == [False, False]
    assert moeca.stats(model).unshared == {"v0": "at a second size the model runs other operators"}


@pytest.mark.slow
def test_floats_stay_constants_and_equal_sizes_apart() -> None:
    model = moeca.compile(joint(), schedule="full", inner="eager", dynamic=True)
    before = traces()
    for size in [(2, 8, 8), (2, 8, 5)]:  # at first three sizes are eight
        calls(model, *size, steps=1)
    assert traces() == before + 1


def dit() -> DiT:
    torch.manual_seed(0)
    return DiT(depth=2, dim=16, heads=2, num_experts=3, top_k=2, hidden=12).eval().requires_grad_(False)


def batches(model: Any, loop: Callable[..., Any]) -> list[Tensor]:
    return [v for batch in (2, 5, 3) for v in loop(model, batch)]


def one_call(model: Any, batch: int) -> Iterator[Tensor]:
    return plain(model, batch=batch, times=TIMES[:6])


@pytest.mark.slow
def test_experts(compiled: list[bool]) -> None:
    model, by_itself = (moeca.compile(dit(), schedule="uniform:3", inner=inner, dynamic=dynamic)
                        for inner, dynamic in (("inductor", True), ("eager", None)))  # fmt: skip
    torch.testing.assert_close(batches(model, one_call), batches(by_itself, one_call), rtol=1e-5, atol=1e-5)
    assert compiled == [True, True]


@pytest.mark.slow
def test_guidance_in_two_calls(compiled: list[bool]) -> None:
    model, by_itself = (moeca.compile(dit(), schedule="uniform:3", inner=inner, dynamic=dynamic)
                        for inner, dynamic in (("inductor", True), ("eager", None)))  # fmt: skip
    found, expected = (list(cfg_calls(one, times=TIMES[:6])) for one in (model, by_itself))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert compiled == [True, True]
    assert moeca.stats(model).unshared == {}


@pytest.mark.slow
def test_outputs_alone() -> None:
    model = moeca.compile(joint(), schedule="uniform:3", granularity="output", inner="eager", dynamic=True)
    by_itself = moeca.compile(joint(), schedule="uniform:3", granularity="output", inner="eager")
    before = traces()
    found = [calls(model, *size) for size in EIGHT]
    assert traces() == before + 1
    torch.testing.assert_close(found, [calls(by_itself, *size) for size in EIGHT], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_once_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeca_compile.lowering.inductor import lower

    seen: list[bool] = []
    original = lower._compiled

    def count(options: Any, gm: Any, args: Any, mode: Any) -> Any:
        seen.append(mode is not None)
        return original(options, gm, args, mode)

    monkeypatch.setattr(lower, "_compiled", count)
    model = moeca.compile(joint(), schedule="uniform:3", dynamic=True)
    by_itself = moeca.compile(joint(), schedule="uniform:3", inner="eager")
    for size in EIGHT[:4]:
        torch.testing.assert_close(calls(model, *size), calls(by_itself, *size), rtol=1e-5, atol=1e-5)
    assert seen == [True, True]
