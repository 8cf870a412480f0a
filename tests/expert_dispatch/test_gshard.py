"""One-hot dispatch with a capacity: the canonical form where nothing is dropped."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch import prepare
from moeca_compile.expert_dispatch.source.flatten import flatten
from moeca_compile.expert_dispatch.source.method_source import read
from moeca_compile.expert_dispatch.source.prune import prune
from tests.expert_dispatch.branching import Gate, GShard, Rank3, Rank3Normed
from tests.expert_dispatch.layers import WIDTH
from tests.expert_dispatch.test_dispatch import compiled
from tests.facts import Recorder


def tokens(seed: int = 3) -> Tensor:
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("comprehension", [False, True])
def test_nothing_dropped(comprehension: bool, fact: Recorder) -> None:
    fact(
        "dispatch",
        "HunyuanImage-3: one-hot dispatch and combine, room for the fullest expert",
        family="gshard",
        result="rewritten",
    )
    torch.manual_seed(0)
    layer = GShard("all", comprehension).eval()
    with torch.no_grad():
        wanted = layer(tokens())
        (one,) = prepare(layer).changed
        assert (one.family, one.num_experts, one.activation, one.verified) == ("gshard", 4, "silu", True)
        got, calls = compiled(layer, tokens())
        assert calls == ["moeca.experts"]
        torch.testing.assert_close(got, wanted)
        assert torch.equal(layer(tokens()), wanted)


def test_experts_of_any_body_get_the_rank_that_they_take() -> None:
    torch.manual_seed(0)
    layer = GShard("all", expert=Rank3Normed).eval()
    with torch.no_grad():
        wanted = layer(tokens())
        (one,) = prepare(layer).changed
        assert (one.family, one.activation, one.dense, one.verified) == ("gshard", "any", True, True)
        torch.testing.assert_close(compiled(layer, tokens())[0], wanted)


def test_experts_of_a_rank_that_is_not_known_are_left_alone() -> None:
    class Rank4(Rank3):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1, 2)) if x.dim() == 4 else x.new_zeros(3)[x.dim()]

    (miss,) = prepare(GShard("all", expert=Rank4).eval()).rejected
    assert "can't be run on tokens [n, D]" in miss.reason


def test_a_block_around_the_layer_is_not_counted_again() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = GShard("mean")

        def forward(self, x: Tensor) -> Tensor:
            return x + self.moe(x)

    report = prepare(nn.Sequential(Block(), Block()).eval())
    assert not report.changed
    assert [miss.node for miss in report.rejected] == ["0.moe", "1.moe"]


def test_the_graph_has_nothing_of_the_capacity_s_size() -> None:
    layer, targets = GShard("all").eval(), list[str]()
    prepare(layer)

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layer, backend=backend, fullgraph=True)(tokens())
    assert "moeca.experts" in targets
    assert not {"item", "max", "cumsum"} & set(targets)
    assert not any("einsum" in target for target in targets)


def test_a_capacity_from_the_counts_that_drops_is_left_alone(fact: Recorder) -> None:
    fact(
        "dispatch",
        "HunyuanImage-3's, room for the average expert: tokens are dropped",
        result="left alone: it drops tokens, which can't be left out",
    )
    (miss,) = prepare(GShard("mean").eval()).rejected
    assert "drops tokens, it can't be left out" in miss.reason
    assert miss.where.startswith("branching.py:")


def test_a_static_capacity_is_traced_as_it_is_drops_included(fact: Recorder) -> None:
    fact("dispatch", "HunyuanImage-3's, room of a fixed size", result="traceable as it is, dropped tokens included")
    layer = GShard("static").eval()
    report = prepare(layer)
    assert not report.changed
    assert not report.rejected
    with torch.no_grad():
        got, calls = compiled(layer, tokens())
        torch.testing.assert_close(got, layer(tokens()))
    assert calls == []


def test_settings_of_the_router_decide_not_the_class() -> None:
    report = prepare(nn.Sequential(*(GShard(kind) for kind in ("static", "all", "mean", "all"))).eval())
    assert [one.path for one in report.changed] == ["1", "3"]
    assert [miss.node for miss in report.rejected] == ["2"]


def test_router_s_weights_are_followed() -> None:
    torch.manual_seed(0)
    layer = GShard("all").eval()
    prepare(layer)
    with torch.no_grad():
        compiled(layer, tokens())
        layer.gate = Gate("all")
        torch.testing.assert_close(compiled(layer, tokens())[0], layer(tokens()))


def test_flat_source_is_one_object_and_runs() -> None:
    layer = GShard("all").eval()
    source = read(GShard.forward)
    assert source is not None
    flat = flatten(source, layer)
    assert flat is flatten(source, GShard("mean"))
    assert "self.gate(x)" not in ast.unparse(flat.tree)
    assert "self.gate.project(" in ast.unparse(flat.tree)
    assert {s.lineno for s in ast.walk(flat.tree) if isinstance(s, ast.stmt)} <= set(
        range(source.tree.lineno, (source.tree.end_lineno or 0) + 1)
    )


def test_prune_keeps_what_is_needed() -> None:
    text = """
def f(self, x, out):
    dead = x + 1
    also = [dead]
    also.append(x)
    for i in range(3):
        dead = dead + i
    out.add_(1)
    self.count = 3
    y = torch.zeros(2)
    y[0] = x
    if self.flag:
        z, w = x, dead
    else:
        z = y
    return z
"""
    tree = ast.parse(text).body[0]
    assert isinstance(tree, ast.FunctionDef)
    assert "also" not in ast.unparse(prune(tree))
    kept = ast.unparse(prune(tree))
    for line in ("out.add_(1)", "self.count = 3", "y[0] = x", "z = y", "z, w = (x, dead)", "dead = dead + i"):
        assert line in kept
