"""Linears over slices of the channels become one product, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile.lowering.inductor.fold_linear import fold_linear
from moeca_compile.lowering.inductor.lower import lower_inductor
from tests.lowering.test_lower_inductor import variant
from tests.tools import ops

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
WEIGHT, BIAS = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.arange(5.0)


def traced(call: Callable[..., Tensor], *args: Tensor) -> GraphModule:
    gm = make_fx(call, tracing_mode="fake", pre_dispatch=True)(*args)
    assert isinstance(gm, GraphModule)
    return gm


@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 3, 8), (2, 1, 8), (2, 2, 3, 8)])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_a_slice_is_multiplied_as_rows(shape: tuple[int, ...], bias: Tensor | None) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rest = (WEIGHT,) if bias is None else (WEIGHT, bias)
    gm = traced(lambda x, *rest: F.linear(x.split(4, dim=-1)[1], *rest), x, *rest)
    found = ops(fold_linear(gm))
    assert (found["aten.linear.default"], found["aten.view.default"]) == (1, 2)
    assert torch.equal(gm(x, *rest), F.linear(x.split(4, dim=-1)[1], *rest)), "eager multiplies rows too"


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
    gm = traced(call, X[..., :4], WEIGHT)
    assert ops(fold_linear(gm)) == ops(traced(call, X[..., :4], WEIGHT))


def test_inductor_makes_no_batch_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.graph import GraphLowering

    seen: list[str] = []
    run = GraphLowering.run

    def spy(self: GraphLowering, *args: Tensor) -> object:
        seen.extend(str(node.target) for node in self.module.graph.nodes)
        return run(self, *args)

    monkeypatch.setattr(GraphLowering, "run", spy)
    gm = traced(lambda x, weight: F.linear(x.split(4, dim=-1)[1], weight), X, WEIGHT)
    gm.graph.output_node().args = ((gm.graph.output_node().args[0],),)
    gm.recompile()
    with torch._inductor.config.patch(force_disable_caches=True):
        made = variant()
        made.gm = gm
        (result,) = lower_inductor(made, [X, WEIGHT])([X, WEIGHT])
    assert "aten.mm.default" in seen
    assert "aten.bmm.default" not in seen
    torch.testing.assert_close(result, F.linear(X.split(4, dim=-1)[1], WEIGHT))
