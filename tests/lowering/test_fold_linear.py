"""Linears over slices of the channels become one product, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.lowering.inductor.fold_linear import fold_linear
from moeca_compile.lowering.inductor.lower import lower_inductor
from moeca_compile.pipeline import LOWER_INDUCTOR
from tests.graphs import assert_becomes, assert_unchanged, graph_of
from tests.lowering.test_lower_inductor import variant

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
WEIGHT, BIAS = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.arange(5.0)


@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 3, 8), (2, 1, 8), (2, 2, 3, 8)])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_a_slice_is_multiplied_as_rows(shape: tuple[int, ...], bias: Tensor | None) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rest = (WEIGHT,) if bias is None else (WEIGHT, bias)

    def rows(x: Tensor, *rest: Tensor) -> Tensor:
        return F.linear(x.split(4, dim=-1)[1].view(-1, 4), *rest).view([*shape[:-1], 5])

    assert_becomes(fold_linear, variant(), lambda x, *rest: F.linear(x.split(4, dim=-1)[1], *rest), rows, x, *rest)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, weight: F.linear(x.contiguous(), weight),
        lambda x, weight: F.linear(x[0], weight),
        lambda x, weight: F.linear(x.transpose(0, 1), weight),  # its rows are not evenly spaced
    ],
    ids=["contiguous", "two axes", "transposed"],
)
def test_what_is_no_slice_stays_as_it_is(call: Callable[..., Tensor]) -> None:
    assert_unchanged(fold_linear, graph_of(call, X[..., :4], WEIGHT), variant())


def test_inductor_makes_no_batch_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.graph import GraphLowering

    seen: list[str] = []
    run = GraphLowering.run

    def spy(self: GraphLowering, *args: Tensor) -> object:
        seen.extend(str(node.target) for node in self.module.graph.nodes)
        return run(self, *args)

    monkeypatch.setattr(GraphLowering, "run", spy)
    gm = graph_of(lambda x, weight: F.linear(x.split(4, dim=-1)[1], weight), X, WEIGHT)
    with torch._inductor.config.patch(force_disable_caches=True):
        made = variant()
        made.gm = gm
        (result,) = lower_inductor(made, [X, WEIGHT], passes=LOWER_INDUCTOR)([X, WEIGHT])
    assert "aten.mm.default" in seen
    assert "aten.bmm.default" not in seen
    torch.testing.assert_close(result, F.linear(X.split(4, dim=-1)[1], WEIGHT))
