"""Many experts: several heads with experts of their own, 128 experts with group limits, all forms of transformers.

Each is found and cached as a whole DiT would have it. A call runs no more operators for experts that no token chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.engine.intercept import intercepting
from moeca_compile.engine.program import Program
from tests.facts import Recorder
from tests.following import gathered
from tests.models import SwiGLU
from tests.passes.test_find_inputs import embedding
from tests.reference import Reference

HEADS, SLICE, HIDDEN, TOKENS, STEPS = 3, 8, 8, 6, 5
WIDTH = HEADS * SLICE


class Experts(nn.Module):
    """Experts on a list of tokens, in a loop over those that were chosen."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU(width, HIDDEN) for _ in range(count))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class HeadByHead(nn.Module):
    """Multi-head experts: each slice of a token has a router and experts of its own, one layer after the other."""

    def __init__(self, count: int = 16, top_k: int = 3) -> None:
        super().__init__()
        self.top_k = top_k
        self.routers = nn.ModuleList(nn.Linear(SLICE, count) for _ in range(HEADS))
        self.heads = nn.ModuleList(Experts(SLICE, count) for _ in range(HEADS))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for head, router, part in zip(self.heads, self.routers, x.reshape(-1, WIDTH).chunk(HEADS, -1), strict=True):
            weights, ids = router(part).softmax(-1).topk(self.top_k)
            parts.append(head(part, ids, weights))
        return self.out(torch.cat(parts, -1)).reshape(x.shape)  # type: ignore[no-any-return]


class AllHeads(nn.Module):
    """Multi-head experts in one dispatch: slices are tokens, and each head's ids count on from those before it."""

    def __init__(self, count: int = 16, top_k: int = 3) -> None:
        super().__init__()
        self.count, self.top_k = count, top_k
        self.router = nn.Parameter(torch.randn(HEADS, SLICE, count))
        self.dispatch = Experts(SLICE, HEADS * count)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        slices = x.reshape(-1, HEADS, SLICE)
        weights, ids = torch.einsum("thd,hde->the", slices, self.router).softmax(-1).topk(self.top_k)
        ids = ids + self.count * torch.arange(HEADS, device=x.device)[:, None]
        parts = [part.reshape(-1, part.shape[-1]) for part in (slices, ids, weights)]
        return self.out(self.dispatch(*parts).reshape(x.shape))  # type: ignore[no-any-return]


class Grouped(nn.Module):
    """128 experts in 8 groups: of the 4 best groups the 8 best experts, chosen by biased sigmoids, weighted without."""

    def __init__(self, count: int = 128, groups: int = 8, top_k: int = 8) -> None:
        super().__init__()
        self.groups, self.top_k = groups, top_k
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.register_buffer("bias", torch.linspace(-0.1, 0.1, count))
        self.dispatch = Experts(WIDTH, count)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        scores = self.router(tokens).sigmoid()
        choice = (scores + self.bias).view(len(tokens), self.groups, -1)
        best = choice.topk(2, dim=-1)[0].sum(-1).topk(self.groups // 2, dim=-1)[1]
        allowed = torch.zeros(len(tokens), self.groups, dtype=torch.bool, device=x.device).scatter_(1, best, True)
        ids = choice.masked_fill(~allowed[..., None], float("-inf")).flatten(1).topk(self.top_k)[1]
        weights = scores.gather(1, ids)
        return self.dispatch(tokens, ids, weights / weights.sum(-1, keepdim=True)).reshape(x.shape)  # type: ignore[no-any-return]


class ExpertChoice(nn.Module):
    """64 experts, each of which takes two tokens of a sample, in one batched multiplication."""

    def __init__(self, count: int = 64) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.up = nn.Parameter(torch.randn(count, WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.randn(count, HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weights, tokens = self.router(x).softmax(-1).transpose(1, 2).topk(2, dim=-1)  # [batch, experts, 2]
        index = tokens.flatten(1)[..., None].expand(-1, -1, WIDTH)
        rows = x.gather(1, index).unflatten(1, tokens.shape[1:])
        rows = torch.einsum("beki,eio->beko", F.silu(torch.einsum("beki,eio->beko", rows, self.up)), self.down)
        return torch.zeros_like(x).scatter_add(1, index, (rows * weights[..., None]).flatten(1, 2))


class Transformers(nn.Module):
    """A layer of transformers, in one of its forms of the experts."""

    def __init__(self, implementation: str | None, count: int = 32) -> None:
        super().__init__()
        qwen = pytest.importorskip("transformers.models.qwen3_moe")
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        config = qwen.Qwen3MoeConfig(
            hidden_size=WIDTH, moe_intermediate_size=HIDDEN, num_experts=count, num_experts_per_tok=4
        )
        if implementation is not None:
            config._experts_implementation = implementation
        self.layer = Qwen3MoeSparseMoeBlock(config)

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(x)
        return result[0] if isinstance(result, tuple) else result


class Model(nn.Module):
    """One block with routed experts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.time = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(8, WIDTH)
        self.moe = layer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(embedding(t))[:, None]
        q, k, v = self.qkv(F.layer_norm(x, (WIDTH,)) + c).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.moe(F.layer_norm(x, (WIDTH,)) + c)


LAYERS: dict[str, tuple[Callable[[], nn.Module], str, int, int]] = {
    "multi-head experts, head by head": (HeadByHead, "token", 16, 3),
    "multi-head experts in one dispatch": (AllHeads, "token", 16, 3),
    "128 experts, group limits and a selection bias": (Grouped, "token", 128, 8),
    "64 experts choose their tokens": (ExpertChoice, "expert", 64, 2),
    "transformers: default": (lambda: Transformers(None), "token", 32, 4),
    "transformers: eager": (lambda: Transformers("eager"), "token", 32, 4),
    "transformers: grouped_mm": (lambda: Transformers("grouped_mm"), "token", 32, 4),
    "transformers: batched_mm": (lambda: Transformers("batched_mm"), "token", 32, 4),
}


def build(layer: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model(layer()).eval().requires_grad_(False)
    for parameter in model.moe.parameters():
        parameter.normal_(std=0.3)  # transformers leaves them unset
    return model


def inputs(step: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return noise[0] + 0.1 * step * noise[1], torch.full((batch,), 9.0 - step)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def programs_of(compiled: nn.Module) -> tuple[Program, list[Any]]:
    seen: list[Any] = []

    def look(entry: Any, args: Any, runtime: Any) -> tuple[Any, ...]:
        seen.append(entry.place(args, runtime))
        return tuple(entry.gm(*args))

    with intercepting(look):
        for step in range(STEPS):
            compiled(*inputs(step))
    return seen[0][0], [args for _, args in seen]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("multi-head" in name or "128" in name)) for name in LAYERS]
)
def test_found_and_cached(name: str, fact: Recorder) -> None:
    layer, choice, count, top_k = LAYERS[name]
    model = build(layer)
    truth = [model(*inputs(step)) for step in range(STEPS)]
    compiled = moeca.compile(model, schedule="uniform:2", inner="eager")
    outputs, traced = [], []
    for _ in range(2):
        outputs.append([compiled(*inputs(step)) for step in range(STEPS)])
        traced.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert traced[0] == traced[1]
    program, args = programs_of(compiled)
    assert [region.kind for region in program.regions] == ["attention", "experts"]
    routers = [router for region in program.regions for router in region.routers]
    assert {(router.choice, router.num_experts, router.top_k) for router in routers} == {(choice, count, top_k)}
    for trajectory in outputs:
        oracle = Reference(program.analysis.gm, program.regions, program.schedule, gathered)
        for step, found in enumerate(trajectory):
            row = program.schedule.rows[program.schedule.row_index(step) or 0]
            assert torch.equal(oracle(row, args[step])[0], found), f"step {step}"
    assert torch.allclose(outputs[0][0], truth[0], atol=1e-5)
    fact("routing", f"In numbers: {name}", choice=choice, cached="whole")


GROWING: dict[str, Callable[[int], nn.Module]] = {
    "in a list": lambda count: Grouped(count, groups=2, top_k=2),
    "in one dispatch of all heads": lambda count: AllHeads(count, top_k=2),
    "transformers: default": lambda count: Transformers(None, count),
    "transformers: eager": lambda count: Transformers("eager", count),
    "transformers: grouped_mm": lambda count: Transformers("grouped_mm", count),
    "transformers: batched_mm": lambda count: Transformers("batched_mm", count),
}


VIEWS = ("aten::select", "aten::slice", "aten::as_strided")  # of packed weights, one an expert: they copy nothing


def operators(layer: Callable[[], nn.Module]) -> Counter[str]:
    """What runs in a computed step whose tokens all choose the same experts, but for views."""
    model = build(layer)
    for name, parameter in model.moe.named_parameters():
        if "router" in name or "gate.weight" in name:
            parameter.zero_()  # all scores are equal: the first experts are chosen
    compiled = moeca.compile(model, schedule="uniform:2", inner="eager")
    compiled(*inputs(0))
    with torch.profiler.profile() as profile:
        compiled(inputs(0)[0] + 1000, inputs(0)[1])  # another trajectory
    assert [record.variant for record in moeca.stats(compiled).steps] == ["v0"]
    names = [event.name for event in profile.events()]
    return Counter(name for name in names if name.startswith("aten::") and name not in VIEWS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name.endswith(("eager", "batched_mm", "default", "in a list", "of all heads"))
        else name
        for name in GROWING
    ],
)
def test_experts_that_nobody_chose_cost_nothing(name: str) -> None:
    few, many = (operators(lambda count=count: GROWING[name](count)) for count in (4, 12))  # type: ignore[misc]
    assert few == many
