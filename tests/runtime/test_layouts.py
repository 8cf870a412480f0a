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


@pytest.mark.parametrize("schedule", ["full", "uniform:3"])
@pytest.mark.parametrize("first", [True, False], ids=["first call", "in the middle"])
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


def test_an_empty_input_beside_others_is_cached_as_ever() -> None:
    model = compiled(WithExtras().eval().requires_grad_(False))
    found = run(plain(lambda x, t, y: model(x, t, y, torch.zeros(0, 3))))
    assert all(torch.equal(a, b) for a, b in zip(found, run(plain(compiled(dit()))), strict=True))
    assert moeca.stats(model).mac_fraction < 0.6
