"""Experts that take more than the tokens are rewritten with all that they take, and proven."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.expert_dispatch import prepare
from tests.expert_dispatch.conditioned import Conditioned, ConditionedList, FourArguments, OneForAll
from tests.expert_dispatch.layers import EXPERTS, WIDTH
from tests.expert_dispatch.test_dispatch import compiled
from tests.facts import Recorder, named_by_docstring


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 9, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)


@pytest.mark.parametrize("make", [Conditioned, ConditionedList])
def test_what_experts_take_beside_the_token_goes_with_it(make: Callable[[], nn.Module], fact: Recorder) -> None:
    torch.manual_seed(0)
    layer = make().eval()
    with torch.no_grad():
        wanted = layer(*inputs())
        report = prepare(layer)
        (one,) = report.changed
        assert (one.family, one.num_experts, one.dense, one.verified) == ("numpy_loop", EXPERTS, True, True)
        assert not report.rejected
        torch.testing.assert_close(compiled(layer, *inputs())[0], wanted)
        assert torch.equal(layer(*inputs()), wanted)
    if make is Conditioned:
        result = "rewritten; every expert runs on every token"
        fact("dispatch", named_by_docstring(make), family=one.family, result=result)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OneForAll, "expert 0 mixes tokens, or doesn't give the same twice"),
        (FourArguments, "expert 0 takes 4 arguments: the tokens and up to 2 more values a token are known"),
    ],
)
def test_other_experts_are_left_alone_and_told_once(make: Callable[[], nn.Module], reason: str) -> None:
    """The loop of the training branch goes to the same experts."""
    layer = Conditioned()
    layer.experts = nn.ModuleList(make() for _ in range(EXPERTS))
    (miss,) = prepare(layer.eval()).rejected
    assert reason in miss.reason


class Timed(nn.Module):
    """One layer in a model that a sampler calls."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.norm, self.moe = nn.Linear(4, WIDTH), nn.LayerNorm(WIDTH), Conditioned()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.tensor([1.0, 2.0])
        c = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        return x + c[:, None] * self.moe(self.norm(x), c)


@pytest.mark.slow
def test_a_layer_of_them_is_one_graph_and_cached() -> None:
    torch.manual_seed(0)
    model = Timed().eval().requires_grad_(False)
    x = inputs()[0]
    with torch.no_grad():
        wanted = [model(x * (1 - 0.1 * step), torch.full((2,), 0.9 - 0.1 * step)) for step in range(4)]
        compiled_model = torch.compile(model, backend="moeca", options={"schedule": "uniform:2", "inner": "eager"})
        found = [compiled_model(x * (1 - 0.1 * step), torch.full((2,), 0.9 - 0.1 * step)) for step in range(4)]
    stats = moeca.stats(compiled_model)
    assert stats.graphs == 1
    assert [record.variant for record in stats.steps] == ["v0", "v1", "v0", "v1"]
    torch.testing.assert_close(found[::2], wanted[::2])
    (region,) = moeca.explain(compiled_model, x, torch.full((2,), 0.9)).regions
    assert region.kind == "experts"
