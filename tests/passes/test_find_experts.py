"""MoE layers and their routers; every miss with its reason and its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moeca_compile.graph import fx
from moeca_compile.graph.regions import Rejected
from moeca_compile.passes.analysis.find_experts import find_experts
from moeca_compile.passes.facts import Facts
from moeca_compile.pipeline import Analysis
from tests.facts import Recorder, named_by_docstring
from tests.passes.blocks import DIM, Block, Grouped, Routed, Stack, Timed, latent, routed, times
from tests.tools import analyze_module, node, ops

NO_ROUTER = "no router found for its expert ids: no branch cache for it"


class Softmax(Routed):
    """Softmax, the weights as they are."""


class Sigmoid(Routed):
    """Selected with a bias, weighted without it, renormalised."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).sigmoid()
        ids = (scores + torch.tensor([0.1, 0.0, -0.1])).topk(self.top_k, sorted=False)[1]
        weights = scores.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True), ids


class Sorted(Routed):
    """Ids reordered and recast between the top-k and the experts."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        ids, order = ids.to(torch.int32).sort(-1)
        return weights.gather(1, order), ids.long()


class First(Routed):
    """Top-1 by a maximum."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).max(-1, keepdim=True)
        return weights, ids


class Hashed(Routed):
    """Routed by position, with weights from a top-k that says nothing of the ids."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = (torch.arange(x.shape[0]) % 3).unsqueeze(1).expand(-1, self.top_k)
        return self.router(x).softmax(-1).topk(self.top_k)[0], ids


class Dense(Routed):
    """A top-k whose experts all run: nothing of ours."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        share = torch.zeros(*x.shape[:2], 3).scatter(-1, ids, weights)
        return sum(share[..., e : e + 1] * (x @ self.up[e].t() @ self.down[e].t()) for e in range(3))


def analyze(*moes: nn.Module) -> Analysis:
    return analyze_module(Timed(Stack(*(Block(mlp=moe) for moe in moes))), latent(), times())


def reasons(context: Facts) -> list[str]:
    return [miss.reason for miss in context.rejected]


@pytest.mark.parametrize("kind", [Softmax, Sigmoid, Grouped, Sorted])
def test_the_router_is_the_top_k_that_gives_the_ids(kind: Callable[[], Routed], fact: Recorder) -> None:
    analysis = analyze(kind())
    (info,) = analysis.facts.experts
    assert info.router is not None
    topk, call = node(analysis.gm, info.router.topk), node(analysis.gm, info.node)
    assert fx.is_experts(call)
    assert call.args[1] is node(analysis.gm, info.ids)
    assert topk.args[1] == info.router.top_k == 2
    assert info.router.num_experts == 3
    assert topk.args[0] is node(analysis.gm, info.router.scores)
    assert fx.shape(node(analysis.gm, info.router.scores)) == (8, 3)
    assert fx.Cone(analysis.gm).feeds(topk, node(analysis.gm, info.ids))
    assert reasons(analysis.facts) == []
    row = f"`moeca::experts`: {named_by_docstring(kind)}"
    fact("routing", row, choice=info.router.choice, cached="whole; branches can be told apart")


def test_of_two_top_ks_the_last_is_the_router() -> None:
    analysis = analyze(Grouped())
    (info,) = analysis.facts.experts
    topks = [n.name for n in analysis.gm.graph.nodes if n.target is fx.aten.topk.default]
    assert len(topks) == 2
    assert info.router is not None
    assert info.router.topk == topks[1]


def test_every_layer_has_its_own_router() -> None:
    analysis = analyze(Softmax(), Sigmoid(), Grouped())
    routers = [info.router.topk for info in analysis.facts.experts if info.router]
    assert len(set(routers)) == len(routers) == 3
    for info, region in zip(analysis.facts.experts, analysis.facts.regions.regions[1::2], strict=True):
        assert info.router is not None
        assert {info.node, info.router.topk} <= set(region.body)
        assert (region.kind, region.experts) == ("experts", (info,))


def test_a_maximum_is_a_top_1() -> None:
    (info,) = analyze(First(top_k=1)).facts.experts
    assert info.router is not None
    assert (info.router.top_k, info.router.num_experts) == (1, 3)


@pytest.mark.parametrize("before", [(), (Softmax,)], ids=["alone", "behind a routed layer"])
def test_ids_that_nothing_routed_are_a_miss(before: tuple[Callable[[], Routed], ...]) -> None:
    analysis = analyze(*(one() for one in before), Hashed())
    info = analysis.facts.experts[-1]
    assert info.router is None
    (miss,) = [miss for miss in analysis.facts.rejected if miss.reason == NO_ROUTER]
    assert miss.node == info.node
    assert miss.where.startswith("blocks.py:")
    assert analysis.facts.regions.regions[-1].kind == "experts"


def test_experts_in_another_form_have_a_router_and_no_call() -> None:
    analysis = analyze(Dense(shared=False))
    assert "moeca.experts.default" not in ops(analysis.gm)
    assert analysis.facts.experts == analysis.facts.rejected == ()
    region = analysis.facts.regions.regions[-1]
    assert (region.kind, [router.choice for router in region.routers]) == ("experts", ["token"])


def test_misses_are_shown_with_the_regions() -> None:
    context = analyze(Dense(), Hashed()).facts
    assert reasons(context) == [NO_ROUTER]
    assert context.regions.rejected == context.rejected


def test_misses_of_earlier_passes_are_kept() -> None:
    before = Facts(routed().facts.inputs, rejected=(Rejected("found before"),))
    assert find_experts(routed().gm, replace(before, routers=routed().facts.routers)).rejected == before.rejected


def test_a_model_without_experts_has_none_and_misses_none() -> None:
    context = analyze_module(Timed(Block()), latent(), times()).facts
    assert (context.experts, context.rejected) == ((), ())


def test_experts_directly_on_an_input_are_found() -> None:
    up, down = [torch.randn(6, DIM) for _ in range(3)], [torch.randn(DIM, 6) for _ in range(3)]

    def model(x: Tensor, ids: Tensor) -> Tensor:
        return x + torch.ops.moeca.experts(x, ids, up, down, [], [], [], [], "silu").sum(1)

    context = analyze_module(model, torch.randn(5, DIM), torch.zeros(5, 2, dtype=torch.int64)).facts
    assert context.experts[0].ids == "ids"
    assert reasons(context) == [NO_ROUTER]
