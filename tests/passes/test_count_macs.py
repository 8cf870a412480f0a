"""Multiply-accumulates: by hand for each operator, and against torch's own FLOP counter for a whole model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moeca_compile.graph import fx
from moeca_compile.passes.analysis.count_macs import node_macs
from tests.passes.blocks import DIM, Block, Routed, Stack, Timed, latent, routed, times
from tests.tools import analyze_module

X = torch.randn(2, 4, 8)
W = torch.randn(8, 6)

# each op on x [2, 4, 8], and what it costs
COSTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "linear": (lambda x: F.linear(x, W.t(), torch.ones(6)), 2 * 4 * 8 * 6),
    "matmul": (lambda x: x @ W, 2 * 4 * 8 * 6),
    "matmul with itself": (lambda x: x.mT @ x.mT.mT, 2 * 8 * 4 * 8),
    "matmul of one tensor": (lambda x: torch.matmul(x[:, :, :4], x[:, :, :4]), 2 * 4 * 4 * 4),
    "matrix times vector": (lambda x: x @ W[:, 0], 2 * 4 * 8),
    "broadcast matmul": (lambda x: x.unsqueeze(1) @ torch.ones(3, 8, 5), 2 * 3 * 4 * 8 * 5),
    "mm": (lambda x: torch.mm(x[0], W), 4 * 8 * 6),
    "bmm": (lambda x: torch.bmm(x, x.mT), 2 * 4 * 4 * 8),
    "addmm": (lambda x: torch.addmm(torch.ones(6), x[0], W), 4 * 8 * 6),
    "addmm on itself": (lambda x: torch.addmm(x[0, :, :4], x[0, :, :4], torch.ones(4, 4)), 4 * 4 * 4),
    "baddbmm": (lambda x: torch.baddbmm(torch.ones(2, 4, 6), x, W.expand(2, 8, 6)), 2 * 4 * 8 * 6),
    "sdpa": (lambda x: F.scaled_dot_product_attention(x, x[:, :3], x[:, :3]), 2 * 4 * 3 * (8 + 8)),
    "sdpa of other widths": (lambda x: F.scaled_dot_product_attention(x, x[:, :3], x[:, :3, :5]), 2 * 4 * 3 * (8 + 5)),
    "sdpa of heads": (lambda x: F.scaled_dot_product_attention(*[x.view(2, 4, 2, 4).mT] * 3), 2 * 4 * 4 * 4 * (2 + 2)),
    "conv2d": (lambda x: F.conv2d(x.view(1, 1, 8, 8), torch.ones(5, 1, 2, 2), stride=2), 5 * 4 * 4 * 4),
    "conv2d in groups": (lambda x: F.conv2d(x.view(1, 4, 4, 4), torch.ones(4, 1, 3, 3), groups=4), 4 * 2 * 2 * 9),
    "conv2d, same padding": (
        lambda x: F.conv2d(x.view(1, 1, 8, 8), torch.ones(2, 1, 3, 3), padding="same"),
        2 * 64 * 9,
    ),
    "conv1d": (lambda x: F.conv1d(x, torch.ones(3, 4, 2)), 2 * 3 * 7 * 8),
    "conv3d": (lambda x: F.conv3d(x.view(1, 1, 4, 4, 4), torch.ones(2, 1, 2, 2, 2)), 2 * 27 * 8),
    "einsum": (lambda x: torch.einsum("nqd,nkd->nqk", x, x + 1), 2 * 4 * 4 * 8),
    "einsum of one tensor": (lambda x: torch.einsum("nqd,nkd->nqk", x, x), 2 * 4 * 4 * 8),
    "einsum with spaces": (lambda x: torch.einsum("n q d, d f -> n q f", x, W), 2 * 4 * 8 * 6),
    "einsum that permutes": (lambda x: torch.einsum("nqd->dqn", x), 0),
    "elementwise": (lambda x: (x * 2 + x.sin()).softmax(-1), 0),
    "norm": (lambda x: F.layer_norm(x, (8,)), 0),
    "views": (lambda x: x.reshape(-1).contiguous().view(8, 8), 0),
}


def test_every_operator_costs_what_its_shapes_say() -> None:
    """All in one graph: the lines of the model's source tell them apart."""
    analysis = analyze_module(lambda x: tuple(op(x) for op, _ in COSTS.values()), X)
    found: dict[str, int] = {}
    for node in analysis.gm.graph.nodes:
        if node.op == "call_function":
            found[fx.where(node)] = found.get(fx.where(node), 0) + node_macs(node)
    expected = {f"test_count_macs.py:{op.__code__.co_firstlineno}": cost for op, cost in COSTS.values()}
    names = {f"test_count_macs.py:{op.__code__.co_firstlineno}": name for name, (op, _) in COSTS.items()}
    wrong = {names[at]: (found.get(at), cost) for at, cost in expected.items() if found.get(at, 0) != cost}
    assert wrong == {}
    assert len(expected) == len(COSTS)


def test_placeholders_and_outputs_cost_nothing() -> None:
    gm = routed().gm
    assert all(node_macs(node) == 0 for node in gm.graph.nodes if node.op != "call_function")


def test_the_facts_name_only_what_costs() -> None:
    analysis = routed()
    macs = dict(analysis.facts.macs)
    assert all(cost > 0 for cost in macs.values())
    assert macs == {node.name: cost for node in analysis.gm.graph.nodes if (cost := node_macs(node))}


@pytest.mark.parametrize("gate", [False, True])
def test_experts_cost_their_routed_tokens_and_not_all_experts(gate: bool) -> None:
    tokens, top_k, experts, hidden = 10, 2, 5, 6
    up, down = [torch.randn(hidden, DIM) for _ in range(experts)], [torch.randn(DIM, hidden) for _ in range(experts)]

    def model(x: Tensor, ids: Tensor) -> Tensor:
        return torch.ops.moeca.experts(x, ids, up, down, up if gate else [], [], [], [], "silu")

    inputs = torch.randn(tokens, DIM), torch.zeros(tokens, top_k, dtype=torch.int64)
    (cost,) = dict(analyze_module(model, *inputs).facts.macs).values()
    assert cost == tokens * top_k * hidden * DIM * (3 if gate else 2)


def test_a_model_costs_half_of_the_flops_that_torch_counts() -> None:
    model = Timed(Stack(Block("gate left"), Block("parallel, gated"))).requires_grad_(False)
    x, t = latent(), times()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it doesn't know the CPU's kernel
        model(x, t)
    total = analyze_module(model, x, t).facts.regions.total_macs
    assert total == counter.get_total_flops() / 2


def test_routed_experts_cost_what_dense_ones_would_times_their_share() -> None:
    """Three experts, two a token: two thirds of all experts on all tokens."""
    analysis = routed()
    (experts, _) = [node_macs(node) for node in analysis.gm.graph.nodes if fx.is_experts(node)]
    tokens, hidden = 8, 6
    assert experts == tokens * 2 * (2 * hidden * DIM)
    assert len(list(Routed().up)) == 3
