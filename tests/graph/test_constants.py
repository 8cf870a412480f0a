"""Numbers read out of tensors: those that the model made of constants are known, all others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.graph.constants import constants_of
from tests.passes.blocks import DIM, Block, Timed, latent
from tests.tools import capture_module, run_graph, same, trace_module


def by_item(x: Tensor) -> Tensor:
    sizes = torch.tensor([2, 3]).repeat(2, 1)
    return x[:, : sizes[0].prod().item() - 4]


def by_list(x: Tensor) -> Tensor:
    return torch.cat(x.split(torch.full((2,), x.shape[1] // 2).tolist(), dim=1)[::-1], dim=1)


def as_size(x: Tensor) -> Tensor:
    height, width = torch.tensor([2, 2])
    return x.reshape(x.shape[0], height, width, -1)


def from_a_shape(x: Tensor) -> Tensor:
    return x * torch.tensor(x.shape).sum().item()


@pytest.mark.parametrize("model", [by_item, by_list, as_size, from_a_shape])
def test_a_number_that_the_model_made_itself_is_captured(model: Callable[[Tensor], Tensor]) -> None:
    captured, args = capture_module(model, latent())
    assert same(run_graph(captured.gm, args)[0], model(*args))
    assert same(run_graph(captured.gm, (args[0] * 2,))[0], model(args[0] * 2))


def of_the_latent(x: Tensor) -> Tensor:
    return x[:, : (x > 100).sum().item() + 1]


def drawn(x: Tensor) -> Tensor:
    return x[:, : torch.randint(1, 3, ()).item()]


def written_to(x: Tensor) -> Tensor:
    size = torch.zeros(2, dtype=torch.int64)
    size[0] = (x > 100).sum()
    return x[:, : size.sum().item() + 1]


def written_to_through_a_view(x: Tensor) -> Tensor:
    size = torch.zeros(2, dtype=torch.int64)
    size[:1].add_((x > 100).sum())
    return x[:, : size.sum().item() + 1]


@pytest.mark.parametrize("model", [of_the_latent, drawn, written_to, written_to_through_a_view])
def test_a_number_that_depends_on_data_is_no_constant_and_read_anew(model: Callable[[Tensor], Tensor]) -> None:
    traced = trace_module(model, latent())
    assert not {node.name for node in constants_of(traced.gm, traced.args) if node.target == "item"}
    captured, (x,) = capture_module(model, latent())
    large = x.clone()
    large[0, :2, 0] = 200.0
    for given, seed in ((x, 0), (large, 1), (large, 2)):
        torch.manual_seed(seed)
        wanted = model(given)
        torch.manual_seed(seed)
        assert same(run_graph(captured.gm, (given,))[0], wanted)


# -- through torch.compile --------------------------------------------------------------------------------------------


X, T = torch.linspace(-1, 1, 2 * 4 * DIM).reshape(2, 4, DIM), torch.full((2,), 3.0)


class Reads(nn.Module):
    """A block, and behind it a number is read out of a tensor."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.read = Timed(Block("gate left")), read

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.read(self.body(x, t))


class Tabled(nn.Module):
    """Builds a table in its first call, with code that Dynamo doesn't trace."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.table = Timed(Block("gate left")), None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.table is None:
            torch._dynamo.graph_break()
            self.table = torch.linspace(0, 1, DIM)
        return self.body(x + self.table, t)


def steps(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(X * (1 - 0.05 * step), T - 0.1 * step) for step in range(3)]


def compiled(model: nn.Module, by_hand: bool) -> Any:
    torch._dynamo.reset()
    if by_hand:
        return moeca.compile(model, schedule="uniform:2", order=0, inner="eager")
    return torch.compile(model, backend="moeca", options={"schedule": "uniform:2", "order": 0, "inner": "eager"})


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (lambda: Reads(by_list), 0),
        (Tabled, 1),  # the broken first call stores its table last; after a table that changed the next step is cold
    ],
    ids=["numbers", "tables"],
)
def test_a_model_that_broke_in_its_first_call_is_one_graph(
    make: Callable[[], nn.Module], changes: int, by_hand: bool
) -> None:
    torch.manual_seed(0)
    module = make().eval().requires_grad_(False)
    model = compiled(module, by_hand)
    found, truth = steps(model), steps(module)
    exact = [same(a, b) for a, b in zip(found, truth, strict=True)]
    assert exact == [[True, False, True], [True, True, True]][changes]
    stats = moeca.stats(model)
    assert (stats.graphs, [record.step for record in stats.steps]) == (1, [0, 1, 2])


@pytest.mark.slow
def test_a_model_that_is_compiled_twice_is_one_graph_under_both() -> None:
    torch.manual_seed(0)
    module = Reads(by_list).eval().requires_grad_(False)
    both = [compiled(module, by_hand=True), moeca.compile(module, schedule="uniform:3", order=0, inner="eager")]
    for model in both * 2:  # the second was traced anew, and with it the first
        steps(model)
    assert [moeca.stats(model).graphs for model in both] == [1, 1]
    assert [len({record.variant for record in moeca.stats(model).steps}) for model in both] == [2, 2]


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_model_whose_numbers_depend_on_data_is_one_graph_too(by_hand: bool) -> None:
    torch.manual_seed(0)
    module = Reads(lambda x: x * (x > 0).sum().item() / 20).eval().requires_grad_(False)
    model = compiled(module, by_hand)
    found, truth = steps(model), steps(module)
    assert [same(a, b) for a, b in zip(found, truth, strict=True)] == [True, False, True]
    assert moeca.stats(model).graphs == 1
