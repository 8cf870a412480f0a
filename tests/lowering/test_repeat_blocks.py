"""Equal blocks become one body and a call for each; everything else stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from moeca_compile.graph import fx
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.lower import lower_inductor
from moeca_compile.lowering.inductor.repeat_blocks import repeat_blocks
from moeca_compile.lowering.inductor.straight_stream import straight_stream
from moeca_compile.options import Options
from moeca_compile.passes.manager import PassManager
from moeca_compile.pipeline import LOWER_INDUCTOR, Analysis, build_variant
from tests.graphs import assert_unchanged
from tests.models import DiT
from tests.sampling import compiled, plain, run
from tests.tools import analyze_module, ops, row, schedule_of, trace_module

DEPTH = 5


def dit(depth: int = DEPTH) -> DiT:
    torch.manual_seed(0)
    return DiT(depth=depth, dim=16, heads=2, num_experts=3, top_k=2, hidden=12).eval().requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), torch.tensor([1, 2])


def analysis_of(change: Callable[[DiT], Any] = lambda model: None) -> Analysis:
    model = dit()
    change(model)
    moeca.prepare(model)
    return analyze_module(model, *inputs())


@cache
def plain_analysis() -> Analysis:
    return analysis_of()


def variant_of(analysis: Analysis, text: str) -> Variant:
    schedule = schedule_of(analysis, "C" * len(text), text)
    return build_variant(analysis, schedule, row(text), Options(inner="eager"), "v")[0]


def lowered(variant: Variant) -> tuple[GraphModule, GraphModule]:
    """The graph that Inductor would get without bodies, and with them."""
    without = [one for one in LOWER_INDUCTOR if one not in (straight_stream, repeat_blocks)]
    whole, repeated = (PassManager().rewrite(passes, variant.gm, variant) for passes in (without, LOWER_INDUCTOR))
    return whole, repeated


def calls(gm: GraphModule) -> int:
    return sum("invoke_subgraph" in str(node.target) for node in gm.graph.nodes)


def arguments(gm: GraphModule) -> list[Tensor]:
    torch.manual_seed(1)

    def like(val: Tensor) -> Tensor:
        whole = not val.is_floating_point()
        return torch.ones(val.shape, dtype=val.dtype) if whole else 0.1 * torch.randn(val.shape, dtype=val.dtype)

    return [like(fx.need(node)) for node in fx.placeholders(gm)]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["C" * 2 * DEPTH, "FC" * DEPTH, "CF" * DEPTH])
def test_equal_blocks_are_calls_of_one_body_that_computes_the_same(text: str) -> None:
    whole, repeated = lowered(variant_of(plain_analysis(), text))
    assert calls(repeated) == DEPTH
    assert len(repeated.graph.nodes) < len(whole.graph.nodes)
    assert not ops(repeated)["moeca.experts.default"]
    given = arguments(whole)
    with torch.no_grad():
        for one, other in zip(repeated(*given), whole(*given), strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_reused_blocks_stay_one_stretch() -> None:
    whole, repeated = lowered(variant_of(plain_analysis(), "F" * 2 * DEPTH))
    assert calls(repeated) == 0
    assert len(repeated.graph.nodes) == len(whole.graph.nodes)


@pytest.mark.slow
def test_a_block_that_differs_is_left_out() -> None:
    def wider(model: DiT) -> None:
        torch.manual_seed(2)
        model.blocks[2] = DiT(depth=1, dim=16, heads=4, num_experts=3, top_k=2, hidden=12).blocks[0].eval()
        model.requires_grad_(False)

    variant = variant_of(analysis_of(wider), "C" * 2 * DEPTH)
    assert calls(lowered(variant)[1]) == DEPTH - 1


@pytest.mark.parametrize("case", ["too few", "a view leaves", "no module list"])
def test_what_has_no_equal_blocks_is_given_back_unchanged(case: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.fc(x)
            return x, x[:, :2]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [Block() for _ in range(3 if case == "too few" else 5)]
            self.blocks = nn.ModuleList(blocks)
            for i, block in enumerate(blocks):
                setattr(self, f"b{'abcde'[i]}", block)

        def forward(self, x: Tensor) -> Tensor:
            kept = []
            for name, block in zip("abcde", self.blocks, strict=False):
                x, part = getattr(self, f"b{name}")(x) if case == "no module list" else block(x)
                kept.append(part if case == "a view leaves" else part.sum())
            return x + sum(one.sum() for one in kept)

    gm = analyze_gm(Model())
    assert_unchanged(repeat_blocks, gm, variant_of(plain_analysis(), "C" * 2 * DEPTH))


def analyze_gm(model: nn.Module) -> GraphModule:
    from moeca_compile.graph.capture import capture

    traced = trace_module(model.requires_grad_(False), torch.randn(2, 8))
    return capture(traced.gm, traced.args, traced.inputs).gm


@pytest.mark.slow
def test_compiled_bodies_are_right() -> None:
    module = dit()
    model = compiled(module, inner="inductor")
    for one, other in zip(run(plain(model), 4), run(plain(compiled(module)), 4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_body_that_inductor_refuses_is_told_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(gm: GraphModule, *args: Any, **keywords: Any) -> Any:
        if calls(gm):
            raise RuntimeError("no bodies here")
        return gm

    monkeypatch.setattr(torch._inductor, "standalone_compile", picky)
    variant = variant_of(plain_analysis(), "C" * 2 * DEPTH)
    with pytest.warns(MoecaWarning, match=r"with one body for equal blocks \(no bodies here\)"):
        run_compiled = lower_inductor(variant, arguments(variant.gm), passes=LOWER_INDUCTOR)
    with torch.no_grad():
        result = run_compiled(arguments(variant.gm))
    assert len(result) == variant.outputs + len(variant.writes)
