"""Sizes that depend on data: captured, found as a routing over the whole batch, cached as a whole; or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import CaptureError
from moeca_compile.graph.capture import capture
from tests.facts import Recorder
from tests.following import Runner, Subject, assert_follows_the_oracle, subject_of
from tests.models import DiT, MoE, SwiGLU
from tests.passes.blocks import DIM, Mlp, latent
from tests.tools import row, schedule_of, trace_module


class DynamicK(MoE):
    """Each expert takes as many tokens of the batch as a threshold says (DiffMoE)"""

    def __init__(self, dim: int, hidden: int, num_experts: int, top_k: int, shared: bool) -> None:
        super().__init__(dim, hidden, num_experts, top_k, shared)
        self.capacity = SwiGLU(dim, hidden)
        self.take = nn.Linear(dim, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.router(tokens).softmax(-1)
        wanted = self.take(self.capacity(tokens)).sigmoid() > 0.5
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            weights, ids = torch.topk(scores[:, e], k=wanted[:, e].sum(), dim=-1, sorted=False)
            out[ids] += weights[:, None] * expert(tokens[ids])
        out = out.reshape(x.shape)
        return out if self.shared is None else out + self.shared(x)


def model() -> nn.Module:
    torch.manual_seed(0)
    built = DiT("dense", depth=2, dim=16, heads=2, hidden=12, size=4, channels=2)
    for block in built.blocks:
        block.moe = DynamicK(16, 12, 4, 2, shared=True)
    return built.double().eval().requires_grad_(False)


def inputs(step: int) -> dict[str, Tensor]:
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return {"x": x * (1 - 0.1 * step), "t": torch.full((2,), 900.0 - 40 * step), "y": torch.tensor([1, 5])}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(model(), inputs)


@pytest.mark.slow
def test_it_is_found_as_a_choice_over_the_batch(subject: Subject, fact: Recorder) -> None:
    layers = [region for region in subject.facts.regions if region.kind == "experts"]
    assert [router.choice for region in layers for router in region.routers] == ["batch", "batch"]
    assert [(router.num_experts, router.top_k) for region in layers for router in region.routers] == [(4, 0)] * 2
    fact("routing", DynamicK.__doc__ or "", choice="batch", cached="whole")


def test_its_cost_is_that_of_the_call_that_was_captured(subject: Subject) -> None:
    """Tokens taken are counted where they were: between no expert's work and all experts' on all tokens."""
    layer = subject.facts.regions.regions[1]
    expert, tokens = 3 * 16 * 12, 2 * 4
    fixed = tokens * (4 * 16 + 3 * 16 * 12 + 4 * 16 + expert)  # router, capacity, shared
    assert fixed < layer.macs <= fixed + 4 * tokens * expert


class Segments(MoE):
    """Tokens sorted by expert and split where a tensor says."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, ids = self.router(tokens).softmax(-1).topk(self.top_k)
        found, order = ids.flatten().sort()
        ends = torch.searchsorted(found, torch.arange(1, len(self.experts)))
        parts = torch.tensor_split(tokens[order // self.top_k], ends)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y = y * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, order // self.top_k, y).view_as(x)


@pytest.mark.slow
def test_every_token_of_a_split_by_data_is_counted() -> None:
    """However the tokens are spread: top-k of them go to some expert."""
    built = model()
    for block in built.blocks:
        block.moe = Segments(16, 12, 4, 2, shared=False).double()
    one = subject_of(built.eval().requires_grad_(False), inputs)
    layers = [region for region in one.facts.regions if region.kind == "experts"]
    assert [layer.macs for layer in layers] == [2 * 4 * (4 * 16 + 2 * 3 * 16 * 12)] * 2


def test_it_follows_the_oracle(subject: Subject) -> None:
    rows = ["CCCC", "CFCC", "FFFF", "CCCC", "RRRR"]
    schedule = schedule_of(subject.analysis, *rows)
    assert_follows_the_oracle(subject, Runner(subject, schedule), [row(text) for text in rows])


@pytest.mark.slow
def test_the_report_says_so() -> None:
    assert "samples depend on their neighbours, cached as a whole" in str(moeca.explain(model(), *inputs(0).values()))


@pytest.mark.slow
def test_a_dispatch_that_traces_is_cached_without_a_warning() -> None:
    """Warnings are errors here: a dispatch that `prepare` leaves alone is no news where nothing breaks."""
    built = model()
    compiled = torch.compile(built, backend="moeca", options={"schedule": "uniform:2", "order": 0, "inner": "eager"})
    found = [compiled(**inputs(step)) for step in range(4)]
    assert [record.variant for record in moeca.stats(compiled).steps] == ["v0", "v1", "v0", "v1"]
    torch.testing.assert_close(found[2], built(**inputs(2)))


@pytest.mark.slow
def test_it_compiles() -> None:
    built = model()
    wanted = [built(**inputs(step)) for step in range(3)]
    compiled = moeca.compile(built, schedule="uniform:2", order=0)
    found = [compiled(**inputs(step)) for step in range(3)]
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[2], wanted[2])
    assert not torch.equal(found[1], wanted[1])


class Growing(nn.Module):
    """A residual on as many rows as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        rows = x[x.mean(-1) > 0]
        return (rows + self.mlp(rows)).sum(0)


def test_a_region_of_unknown_size_is_a_miss() -> None:
    one = subject_of(Growing(), lambda step: {"x": latent()})
    assert not len(one.facts.regions)
    assert "the size of its output depends on data" in one.facts.rejected[0].reason


def doubled_if_large(x: Tensor, n: int) -> Tensor:
    return 2 * x if n > 2 else x


def test_a_decision_by_data_is_refused() -> None:
    """Dynamo breaks its graph at such a branch; what it leaves whole may still hold one."""
    graph = torch.fx.Graph()
    x, n = graph.placeholder("x"), graph.placeholder("n")
    graph.output((graph.call_function(doubled_if_large, (x, graph.call_method("item", (n,)))),))
    traced = trace_module(lambda x, n: x * n, torch.ones(2, DIM), torch.tensor(3))
    with pytest.raises(CaptureError, match="decides by a number that it reads out of a tensor") as error:
        capture(torch.fx.GraphModule({}, graph), traced.args, traced.inputs)
    assert "Pass numbers such as the timestep as tensors" in str(error.value)
    assert "moeca_compile.prepare(model)" in str(error.value)
