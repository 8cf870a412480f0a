"""Inputs that differ in what doesn't matter, and inputs without a sample."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from tests.sampling import compiled, dit, plain, records, run


def odd(x: Tensor, step: int) -> Tensor:
    """A batch of one whose first stride is another at each call."""
    return x if step == 0 else torch.cat([x] * (step % 3 + 2), dim=1).chunk(step % 3 + 2, dim=1)[0]


@pytest.mark.filterwarnings("ignore:steps of other input shapes")
@pytest.mark.slow
def test_strides_of_single_elements_make_no_other_program() -> None:
    """Dynamo makes a second graph, once; there the trajectory may start again, but not at every step."""
    model, x, outputs = compiled(dit()), torch.randn(1, 4, 8, 8), list[Tensor]()
    for step in range(8):
        given = odd(x, step)
        assert torch.equal(given, x)
        with torch.no_grad():
            outputs.append(model(given, torch.tensor([1000.0 - 80 * step]), torch.tensor([1])))
        x = x - 0.08 * outputs[-1]
    assert sum(record.variant != "v0" for record in records(model)) >= 4


@pytest.mark.parametrize("first", [torch.contiguous_format, pytest.param(torch.channels_last, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_latent_in_changing_memory_formats_is_one_trajectory(first: torch.memory_format) -> None:
    """What was kept serves all of them; results lie as they would without the cache."""
    other = torch.channels_last if first is torch.contiguous_format else torch.contiguous_format

    def sample(model: nn.Module, formats: list[torch.memory_format]) -> list[Tensor]:
        x, outputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), list[Tensor]()
        for step in range(9):
            given = x.contiguous(memory_format=formats[step % len(formats)])
            with torch.no_grad():
                outputs.append(model(given, torch.full((2,), 1000.0 - 80 * step), torch.tensor([1, 2])))
            x = x - 0.08 * outputs[-1].contiguous()
        return outputs

    torch._dynamo.reset()
    model = compiled(dit())
    found = sample(model, [first, other])
    assert [record.variant for record in records(model)] == ["v0", "v1", "v1"] * 3
    assert not any(record.cold for record in records(model))
    torch._dynamo.reset()
    wanted = sample(compiled(dit()), [first])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    module = dit()
    torch._dynamo.reset()
    plain_compile = torch.compile(module, backend="eager")
    strides = [one.stride() for one in sample(plain_compile, [first, other])]
    assert [one.stride() for one in found] == strides


@pytest.mark.parametrize("expanded", [pytest.param("time", marks=pytest.mark.slow), "latent"])
@pytest.mark.slow
def test_expanded_inputs_are_like_others(expanded: str) -> None:
    """Nothing can be copied into a tensor whose elements lie in one place."""
    module = dit()
    torch._dynamo.reset()
    model = compiled(module, schedule="full")
    x, labels = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1), torch.tensor([1, 2])
    with torch.no_grad():
        for step in range(4):
            t = torch.full((1,), 900.0 - step).expand(2)
            given = x if expanded == "latent" and step % 2 == 0 else x.contiguous()
            when = t if expanded == "time" and step % 2 == 0 else t.contiguous()
            assert torch.equal(model(given, when, labels), module(given, when, labels))


class Strided(nn.Module):
    """Reads elements by where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dit()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, t, y) + x.as_strided((2, 4, 8, 8), (256, 64, 8, 1))


def test_a_model_that_reads_by_strides_is_given_its_own() -> None:
    module = Strided().eval().requires_grad_(False)
    torch._dynamo.reset()
    model, x = compiled(module, schedule="full"), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        for form in (torch.contiguous_format, torch.channels_last):
            args = x.contiguous(memory_format=form), torch.full((2,), 900.0), torch.tensor([1, 2])
            assert torch.allclose(model(*args), module(*args), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        pytest.param("full", True, marks=pytest.mark.slow),  # in the middle, "full" has no state to change
        pytest.param("uniform:3", True, marks=pytest.mark.slow),
        ("uniform:3", False),
    ],
    ids=["full, first call", "first call", "in the middle"],
)
@pytest.mark.slow
def test_no_samples_give_an_empty_tensor_and_change_nothing(schedule: str, first: bool) -> None:
    module = dit()
    model = compiled(module, schedule=schedule)
    nothing = torch.randn(0, 4, 8, 8), torch.zeros(0), torch.zeros(0, dtype=torch.int64)

    def call() -> None:
        with torch.no_grad():
            assert torch.equal(model(*nothing), module(*nothing))

    if first:
        call()
    truth = run(plain(compiled(dit(), schedule=schedule)))
    found: Iterator[Tensor] = plain(model)
    for step, out in enumerate(found):
        assert torch.equal(out, truth[step])
        if step == 3:
            call()
    assert len(records(model)) == len(truth)


class WithExtras(nn.Module):
    """An input may be empty where the results aren't."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dit()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, extras: Tensor) -> Tensor:
        return self.inner(x, t, y) + extras.sum()


@pytest.mark.slow
def test_an_empty_input_beside_others_is_cached_as_ever() -> None:
    model = compiled(WithExtras().eval().requires_grad_(False))
    found = run(plain(lambda x, t, y: model(x, t, y, torch.zeros(0, 3))))
    assert all(torch.equal(a, b) for a, b in zip(found, run(plain(compiled(dit()))), strict=True))
    assert moeca.stats(model).mac_fraction < 0.6
