"""Residual branches: every way to write one gives the right cut; adds of unrelated values give none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from moeca_compile.graph import fx
from moeca_compile.passes.facts import Branch
from moeca_compile.pipeline import Analysis
from tests.passes.blocks import (
    DIM,
    WAYS,
    Block,
    OneStream,
    Stack,
    TextOfItsOwn,
    Timed,
    TwoStreams,
    analyzed,
    latent,
    routed,
    times,
)
from tests.tools import analyze_module, node, ops

W, V = torch.randn(DIM, DIM), torch.randn(DIM, DIM)


def heavy(analysis: Analysis) -> list[Branch]:
    """The branches with a matmul in them: those that can become regions."""
    costly = dict(analysis.facts.macs)
    return [branch for branch in analysis.facts.branches if any(name in costly for name in branch.body)]


def cuts(analysis: Analysis) -> list[str]:
    return [str(node(analysis.gm, branch.cut).target) for branch in heavy(analysis)]


@pytest.mark.parametrize("way", WAYS)
def test_both_branches_are_found_and_cut_before_the_gate(way: str) -> None:
    """The cut is the branch's own last node, not the product with a gate, a layer scale or a number."""
    analysis = analyzed(way)
    last = {"sandwich": "aten.layer_norm.default", "gate behind a view": "aten.view.default"}
    assert cuts(analysis) == [last.get(way, "aten.linear.default")] * 2
    cone = fx.Cone(analysis.gm)
    for branch in heavy(analysis):
        trunk, cut, join = fx.resolve(analysis.gm, (branch.trunk, branch.cut, branch.join))
        assert join.target is fx.aten.add.Tensor
        assert branch.body == tuple(n.name for n in cone.between(trunk, cut))
        assert "body_ada_weight" not in {
            n.name for one in fx.resolve(analysis.gm, branch.body) for n in one.args if isinstance(n, Node)
        }


def test_parallel_branches_share_their_trunk() -> None:
    for way in ("parallel", "parallel, gated", "parallel, branches first"):
        attention, mlp = heavy(analyzed(way))
        assert attention.trunk == mlp.trunk == "x"
        assert not set(attention.body) & {mlp.cut}


def test_parallel_branches_summed_first_are_one_branch() -> None:
    (branch,) = heavy(analyzed("parallel, one sum"))
    assert branch.trunk == "x"
    assert any(name.startswith("scaled_dot") for name in branch.body)


def test_one_after_the_other_has_one_trunk_after_the_other() -> None:
    first, second = heavy(analyzed("plain"))
    assert (first.trunk, second.trunk) == ("x", first.join)


@pytest.mark.parametrize("last", [False, True])
def test_two_streams_have_a_trunk_each(last: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = TwoStreams(last)

        def forward(self, x: Tensor, text: Tensor, c: Tensor) -> Tensor:
            return self.block(x, c, text)

    analysis = analyze_module(Both(), latent(), torch.randn(2, 3, DIM), torch.randn(2, DIM))
    trunks = [branch.trunk for branch in heavy(analysis)]
    assert trunks.count("x") == 1
    assert trunks.count("text") == (0 if last else 1)
    assert len(trunks) == (2 if last else 4)


def test_a_block_with_one_linear_out_is_one_branch() -> None:
    assert cuts(analyze_module(Timed(OneStream()), latent(), times())) == ["aten.linear.default"]


def test_routed_and_shared_are_one_branch() -> None:
    analysis = routed()
    branch = heavy(analysis)[1]
    assert {"experts", "topk"} <= set(branch.body)
    assert sum(node(analysis.gm, name).target is fx.aten.linear.default for name in branch.body) == 3
    assert node(analysis.gm, branch.cut).target is fx.aten.add.Tensor


def test_a_residual_around_blocks_is_a_branch_of_its_own() -> None:
    analysis = analyze_module(Timed(Stack(Block(), Block(), around=True)), latent(), times())
    found = heavy(analysis)
    assert len(found) == 5
    outer = max(found, key=lambda branch: len(branch.body))
    assert outer.trunk == "x"
    assert {branch.join for branch in found} - {outer.join} <= set(outer.body)


def test_the_embedding_of_the_step_is_a_branch_if_it_is_a_residual() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        c = torch.cat([t.sin(), t.cos()])[:, None].expand(-1, DIM)[:2]
        c = c + F.silu(c @ W) @ V
        return x * c.unsqueeze(1)

    (branch,) = heavy(analyze_module(model, latent(), times()))
    assert branch.trunk == "slice_1"


def test_a_cut_never_moves_into_the_trunk() -> None:
    """In x + (x @ W) * x both factors come from the trunk: neither is a gate."""
    (branch,) = heavy(analyze_module(lambda x: x + (x @ W) * x, latent()))
    assert branch.cut == "mul"


def test_a_gate_made_from_the_trunk_is_part_of_the_branch() -> None:
    (branch,) = heavy(analyze_module(lambda x: x + (x @ W) * (x @ V).sigmoid(), latent()))
    assert branch.cut == "mul"


def test_a_broadcast_operand_is_no_trunk() -> None:
    """A mean that is added to every token is not what goes on from block to block."""

    def model(x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return mean + (mean * x) @ W

    assert heavy(analyze_module(model, latent())) == []


class Layers(nn.Module):
    """Three layers that share a value, added to the stream in each: a shift of one adaLN, or a position table."""

    def __init__(self, position: bool = False) -> None:
        super().__init__()
        self.blocks, self.ada = nn.ModuleList(Block() for _ in range(3)), nn.Linear(DIM, 2 * DIM)
        self.table = nn.Parameter(torch.randn(2, 4, DIM)) if position else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = (one.expand_as(x).contiguous() for one in self.ada(c).unsqueeze(1).chunk(2, dim=-1))
        for block in self.blocks:
            if self.table is not None:
                x = x + self.table
            x = x + block.attn(block.norm1(x) * (1 + scale) + shift)
            x = x + block.mlp(block.norm2(x) * (1 + scale) + shift)
        return x


@pytest.mark.parametrize("position", [False, True])
def test_what_is_added_to_the_stream_in_every_layer_is_no_trunk(position: bool) -> None:
    """From the second layer on it is an ancestor of the stream, with the stream's shape."""
    analysis = analyze_module(Timed(Layers(position)), latent(), times())
    assert [region.kind for region in analysis.facts.regions] == ["attention", "mlp"] * 3
    assert analysis.facts.rejected == ()
    depends = dict(analysis.facts.dependence)
    assert {depends[branch.trunk] for branch in heavy(analysis)} == {"latent"}


def test_a_text_of_one_sample_is_the_trunk_of_a_whole_batch() -> None:
    one, two = (
        analyze_module(TextOfItsOwn(), latent(), torch.randn(batch, 3, DIM), torch.randn(2, DIM)) for batch in (1, 2)
    )
    assert [branch.trunk for branch in heavy(one)][:2] == ["x", "text"]
    joint, mlp = one.facts.regions
    assert (joint.kind, joint.shapes) == ("attention", ((2, 4, DIM), (2, 3, DIM)))
    assert (mlp.kind, mlp.shapes) == ("mlp", ((2, 3, DIM),))
    assert one.facts.rejected == ()
    assert one.facts.regions.fingerprint == two.facts.regions.fingerprint


def test_a_sum_that_is_read_elsewhere_too_is_a_trunk_of_its_own() -> None:
    """In x1 = x + a(x), x1 + b(x) the second branch doesn't start from x1; only where nothing else reads x1 are the two
    branches of one block in parallel."""

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        first = x + (x @ W).relu()
        return first + (x @ V).relu(), first.sin()

    (branch,) = heavy(analyze_module(model, latent()))
    assert branch.trunk == "x"


def test_an_identity_is_no_branch() -> None:
    analysis = analyze_module(lambda x: x + x * 2, latent())
    assert analysis.facts.branches == ()


def swiglu(x: Tensor) -> Tensor:
    return (F.silu(x @ W) * (x @ V)) @ W


def gelu_tanh(x: Tensor) -> Tensor:
    h = x @ W
    return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def gelu_tanh_product(x: Tensor) -> Tensor:
    h = x @ W
    return 0.5 * h * (1.0 + torch.tanh(0.79788 * h * (1.0 + 0.044715 * h * h)))


def rope(x: Tensor) -> Tensor:
    angles = torch.arange(4.0)[:, None] * torch.arange(1.0, DIM + 1)
    q, k = x @ W, x @ V

    def turn(q: Tensor) -> Tensor:
        left, right = q.chunk(2, dim=-1)
        return q * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()

    return F.scaled_dot_product_attention(turn(q), turn(k), x @ W)


def rope_pairs(x: Tensor) -> Tensor:
    q = (x @ W).unflatten(-1, (DIM // 2, 2))
    even, odd = q.unbind(-1)
    cosine, sine = torch.arange(4.0).cos().unsqueeze(-1), torch.arange(4.0).sin().unsqueeze(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(2)


def guidance(x: Tensor) -> Tensor:
    both = torch.cat([x, x]) @ W
    conditional, unconditional = both.chunk(2)
    return unconditional + 4.0 * (conditional - unconditional)


def guidance_of_channels(x: Tensor) -> Tensor:
    both = torch.cat([x, x]) @ W
    eps, rest = both[..., :3], both[..., 3:]
    conditional, unconditional = eps.chunk(2)
    half = unconditional + 4.0 * (conditional - unconditional)
    return torch.cat([torch.cat([half, half]), rest], dim=-1)


UNRELATED: dict[str, Callable[[Tensor], Tensor]] = {
    "bias": lambda x: x @ W + W[0],
    "positions": lambda x: x @ W + torch.arange(4.0)[:, None],
    "positions on the input": lambda x: x + torch.arange(4.0)[:, None],
    "two projections": lambda x: x @ W + x @ V,
    "routed and shared": lambda x: (x @ W).relu() @ V + (x @ V).relu() @ W,
    "modulation": lambda x: (x @ W) * (1 + W[0]) + W[1],
    "swiglu with a bias": lambda x: swiglu(x) + W[0],
    "gelu tanh": gelu_tanh,
    "gelu tanh as a product": gelu_tanh_product,
    "rotary": rope,
    "rotary in pairs": rope_pairs,
    "guidance": guidance,
    "guidance of channels": guidance_of_channels,
    "epsilon": lambda x: (x @ W) / ((x @ W).pow(2).sum(-1, keepdim=True) + 1e-6).sqrt(),
    "a number": lambda x: (x @ W) + 1,
    "layer norm by hand": lambda x: (x - x.mean(-1, keepdim=True)) @ W,
    "swish by hand": lambda x: (x @ W) * (x @ W).sigmoid() + W[0],
}


def test_adds_of_unrelated_values_give_no_region() -> None:
    analysis = analyze_module(lambda x: tuple(model(x) for model in UNRELATED.values()), latent())
    assert ops(analysis.gm)["aten.add.Tensor"] > len(UNRELATED)
    wrong = [fx.where(node(analysis.gm, branch.join)) for branch in heavy(analysis)]
    assert wrong == []
    assert len(analysis.facts.regions) == 0
    assert analysis.facts.rejected == ()


def test_inside_a_branch_they_add_nothing() -> None:
    """x + f(x) is one region whatever adds f has inside."""
    inside = [UNRELATED[name] for name in UNRELATED if name not in ("positions on the input", "guidance of channels")]

    def model(x: Tensor) -> Tensor:
        for one in inside:
            x = x + one(x.tanh())
        return x

    analysis = analyze_module(model, latent())
    assert len(heavy(analysis)) == len(analysis.facts.regions) == len(inside)
    assert analysis.facts.rejected == ()


# -- near misses ------------------------------------------------------------------------------------------------------

V = torch.randn(DIM, DIM)

OTHERWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.sub": lambda x: x - x @ V,
    "aten.lerp": lambda x: torch.lerp(x, x @ V, 0.5),
    "aten.addcmul": lambda x: torch.addcmul(x, x.new_ones(()), x @ V),
    "aten.baddbmm": lambda x: torch.baddbmm(x, x, V.expand(x.shape[0], DIM, DIM)),
    "an add with alpha": lambda x: torch.add(x, x @ V, alpha=2),
}


@pytest.mark.parametrize("way", OTHERWISE)
def test_a_residual_written_with_another_op_is_a_miss_that_names_it(way: str) -> None:
    (miss,) = (m for m in analyze_module(OTHERWISE[way], latent()).facts.rejected if "written as" in m.reason)
    assert way in miss.reason
    assert "x + f(x)" in miss.reason


def test_centring_is_no_residual() -> None:
    assert not analyze_module(lambda x: (x - x.mean(-1, keepdim=True)) @ V, latent()).facts.rejected
