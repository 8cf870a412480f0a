"""Who chooses what: every kind of routing, in every form that experts come in; and top-ks that route nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_compile.errors import InvariantError
from moeca_compile.graph.regions import RouterInfo
from moeca_compile.pipeline import Analysis
from tests.facts import Recorder, named_by_docstring
from tests.passes.blocks import DIM, Attention, Block, Grouped, Mlp, Stack, Timed, latent, times
from tests.tools import analyze_module, node

E, K = 3, 2  # experts and choices; latent() is [2, 4, DIM]


class Weights(nn.Module):
    """A router, packed experts [E, DIM, DIM], and nothing that says how they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.w = nn.Linear(DIM, E), nn.Parameter(torch.randn(E, DIM, DIM))


class AllOnAll(Weights):
    """Every expert on every token, gated by a scattered choice."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        share = torch.zeros(*x.shape[:2], E).scatter(-1, ids, weights)
        return torch.einsum("btd,edf,bte->btf", x, self.w, share)


class Loop(Weights):
    """Every expert on every token in a loop, each output gated."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).sigmoid().topk(K)
        share = torch.zeros(*x.shape[:2], E).scatter(-1, ids, weights / weights.sum(-1, keepdim=True))
        return sum(share[..., e, None] * F.silu(x @ self.w[e]) for e in range(E))


class Gathered(Weights):
    """The weights of each token's experts, gathered."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        y = torch.einsum("btd,btkdf->btkf", x, self.w[ids])
        return (y * weights.unsqueeze(-1)).sum(2)


class Prototypes(Weights):
    """Cosine similarity to one prototype an expert (ProMoE)."""

    def forward(self, x: Tensor) -> Tensor:
        scores = F.normalize(x, dim=-1) @ F.normalize(self.router.weight, dim=-1).t()
        weights, ids = (scores * 4 + torch.tensor([0.1, 0.0, 0.2])).softmax(-1).topk(K)
        share = torch.zeros(*x.shape[:2], E).scatter(-1, ids, weights)
        return torch.einsum("btd,edf,bte->btf", x, self.w, share)


class ExpertChoice(Weights):
    """Each expert takes two tokens of a sample (EC-DiT): one-hot dispatch and combine."""

    def scores(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1).permute(0, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.scores(x).topk(2)
        picked = F.one_hot(ids, x.shape[1]).to(x.dtype)
        y = torch.einsum("bekt,btd,edf->bekf", picked, x, self.w)
        return torch.einsum("bek,bekt,bekf->btf", weights, picked, y)


class ExpertChoiceTransposed(ExpertChoice):
    """Expert choice, the scores transposed before their softmax."""

    def scores(self, x: Tensor) -> Tensor:
        return self.router(x).transpose(1, 2).softmax(1)


class ExpertChoiceByEinsum(ExpertChoice):
    """Expert choice, the scores transposed by an einsum (Kwai's EC-DiT)."""

    def scores(self, x: Tensor) -> Tensor:
        return torch.einsum("b s e -> b e s", self.router(x).softmax(-1))


class ExpertChoiceAlong(ExpertChoice):
    """Expert choice, a top-k along the tokens where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2, dim=1)
        picked = F.one_hot(ids, x.shape[1]).to(x.dtype)
        y = torch.einsum("bket,btd,edf->bkef", picked, x, self.w)
        return torch.einsum("bke,bket,bkef->btf", weights, picked, y)


class ExpertChoiceIndexed(Weights):
    """Expert choice, rows taken and put back by index."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        weights, ids = self.router(x).softmax(-1).permute(0, 2, 1).topk(2)
        rows = (ids + t * torch.arange(n).view(n, 1, 1)).permute(1, 0, 2).reshape(E, -1)
        y = torch.bmm(x.reshape(-1, DIM)[rows], self.w) * weights.permute(1, 0, 2).reshape(E, -1, 1)
        return torch.zeros(n * t, DIM).index_add(0, rows.flatten(), y.flatten(0, 1)).view_as(x)


class OverTheBatch(Weights):
    """Each expert takes tokens of the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, ids = self.router(tokens).softmax(-1).t().topk(3)
        y = torch.bmm(tokens[ids], self.w) * weights.unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, ids.flatten(), y.flatten(0, 1)).view_as(x)


class Heads(Attention):
    """Mixture of heads: all are computed, the chosen ones are let through."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(1)
        share = torch.zeros(*x.shape[:2], 2).scatter(-1, ids, weights)
        out = self.core(*self.heads(x)).transpose(1, 2) * share.unsqueeze(-1)
        return self.proj(out.reshape(x.shape))


class SharedHeads(Heads):
    """Mixture of heads, one of them always on, the gates scaled by others (MoH-DiT)"""

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.core = core
        self.router, self.shared, self.both = nn.Linear(DIM, 3), nn.Linear(DIM, 1), nn.Linear(DIM, 2)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).view(*x.shape[:2], 3, 4, DIM // 4).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        gates = self.router(tokens).softmax(-1)
        chosen = gates * F.one_hot(gates.topk(2).indices, 3).sum(1)
        chosen /= chosen.sum(-1, keepdim=True).clamp(min=1e-6)
        both = self.both(tokens).softmax(-1).view(*x.shape[:2], 2)
        shared = torch.einsum("bn,bne->bne", both[..., 0], self.shared(tokens).softmax(-1).view(*x.shape[:2], 1))
        routed = torch.einsum("bn,bne->bne", both[..., 1], chosen.view(*x.shape[:2], 3) * 2)
        out = self.core(*self.heads(x)).transpose(1, 2)
        out = torch.einsum("bne,bned->bned", torch.cat([shared, routed], dim=2), out)
        return self.proj(out.reshape(x.shape))


class ByTimestep(nn.Module):
    """Switch-DiT: the timestep's embedding chooses the experts of a whole sample."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.router = Attention(), nn.Linear(DIM, E)
        self.w = nn.Parameter(torch.randn(E, DIM, DIM))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(x)
        weights, ids = self.router(c).softmax(-1).topk(K)
        y = torch.einsum("btd,bkdf->bktf", x, self.w[ids])
        return x + (y * weights[:, :, None, None]).sum(1)


def analyze(mlp: nn.Module) -> Analysis:
    return analyze_module(Timed(Stack(Block("gate left", mlp=mlp), Block("gate left"))), latent(), times())


@pytest.mark.parametrize(
    ("make", "choice", "top_k"),
    [
        (AllOnAll, "token", K),
        (Loop, "token", K),
        pytest.param(Gathered, "token", K, marks=pytest.mark.slow),
        pytest.param(Prototypes, "token", K, marks=pytest.mark.slow),
        (ExpertChoice, "expert", 2),
        pytest.param(ExpertChoiceTransposed, "expert", 2, marks=pytest.mark.slow),
        (ExpertChoiceByEinsum, "expert", 2),
        pytest.param(ExpertChoiceAlong, "expert", 2, marks=pytest.mark.slow),
        pytest.param(ExpertChoiceIndexed, "expert", 2, marks=pytest.mark.slow),
        (OverTheBatch, "batch", 3),
    ],
)
def test_the_axis_of_the_choice_says_who_chooses(
    make: Callable[[], nn.Module], choice: str, top_k: int, fact: Recorder
) -> None:
    analysis = analyze(make())
    (router,) = analysis.facts.routers
    assert (router.choice, router.num_experts, router.top_k) == (choice, E, top_k)
    assert node(analysis.gm, router.topk).args[0] is node(analysis.gm, router.scores)
    kinds = [(region.kind, region.routers) for region in analysis.facts.regions]
    assert kinds == [("attention", ()), ("experts", (router,)), ("attention", ()), ("mlp", ())]
    assert analysis.facts.rejected == ()
    fact("routing", named_by_docstring(make), choice=choice, cached="whole")


def test_what_it_steers_is_in_its_layer() -> None:
    analysis = analyze(ExpertChoiceIndexed())
    (router,) = analysis.facts.routers
    assert router.steers
    assert set(router.steers) <= set(analysis.facts.regions.regions[1].body)


def test_heads_that_are_mixed_make_no_experts_region(fact: Recorder) -> None:
    fact("routing", named_by_docstring(Heads), choice="head", cached="whole, as attention")
    analysis = analyze_module(Timed(Block("gate left", mixer=Heads())), latent(), times())
    (router,) = analysis.facts.routers
    assert (router.choice, router.num_experts, router.top_k) == ("head", 2, 1)
    assert [(r.kind, r.routers) for r in analysis.facts.regions] == [("attention", (router,)), ("mlp", ())]


@pytest.mark.parametrize("core", [F.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT).softmax(-1) @ v])
def test_heads_whose_gates_are_scaled_by_other_gates_are_heads(
    core: Callable[[Tensor, Tensor, Tensor], Tensor], fact: Recorder
) -> None:
    fact("routing", named_by_docstring(SharedHeads), choice="head", cached="whole, as attention")
    analysis = analyze_module(Timed(Block("gate left", mixer=SharedHeads(core))), latent(), times())
    (router,) = analysis.facts.routers
    assert (router.choice, router.num_experts, router.top_k) == ("head", 3, 2)
    assert [(r.kind, r.routers) for r in analysis.facts.regions] == [("attention", (router,)), ("mlp", ())]


def test_a_routing_by_the_timestep_is_a_constant_of_the_step(fact: Recorder) -> None:
    """The router lies outside the region that it steers: it doesn't see the latent."""
    analysis = analyze_module(Timed(ByTimestep()), latent(), times())
    (router,) = analysis.facts.routers
    assert (router.choice, router.num_experts, router.top_k) == ("step", E, K)
    experts = analysis.facts.regions.regions[1]
    assert (experts.kind, experts.routers) == ("experts", (router,))
    assert router.topk not in experts.body
    fact("routing", named_by_docstring(ByTimestep), choice="step", cached="whole")


def test_the_choice_of_groups_is_no_router() -> None:
    analysis = analyze(Grouped())
    assert len(analysis.facts.routers) == 1
    assert analysis.facts.experts[0].router == analysis.facts.routers[0]


class Pruned(nn.Module):
    """A top-k over features that no projection scored."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.topk(3)[0].mean(-1, keepdim=True)


class Stable(nn.Module):
    """The maximum that a softmax written out takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        return (y - y.max(-1, keepdim=True)[0]).exp()


class Reported(nn.Module):
    """A top-k that steers nothing: it is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.score = Mlp(), nn.Linear(DIM, E)

    def forward(self, x: Tensor) -> Tensor:
        self.score(x).softmax(-1).topk(1)
        return self.mlp(x)


@pytest.mark.parametrize("make", [Pruned, Stable, Reported])
def test_a_choice_that_routes_nothing_is_no_router(make: Callable[[], nn.Module]) -> None:
    context = analyze(make()).facts
    assert context.routers == context.rejected == ()
    assert "experts" not in [region.kind for region in context.regions]


def test_a_choice_has_one_of_five_names() -> None:
    with pytest.raises(InvariantError, match="choice 'tokens' is none of"):
        RouterInfo("topk", "softmax", 8, 2, "tokens")
