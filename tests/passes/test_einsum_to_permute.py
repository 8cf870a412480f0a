"""An einsum that only reorders the axes of one operand is a permute; every other einsum stays what it is."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.passes.context import Context
from moeca_compile.pipeline import NORMALISE
from moeca_compile.runner import Runner
from tests.passes.blocks import latent
from tests.tools import capture_module, ops, run_graph, same


@pytest.mark.parametrize("equation", ["b s e -> b e s", "abc->cab", "cba", "ijk -> ijk"])
def test_a_reordering_is_a_permute(equation: str) -> None:
    captured, args = capture_module(lambda x: torch.einsum(equation, x).sin(), latent())
    before = run_graph(captured.gm, args)
    gm = Runner().rewrite(NORMALISE, captured.gm, Context(captured.inputs))
    assert ops(gm) == {"aten.permute.default": 1, "aten.sin.default": 1}
    assert same(run_graph(gm, args)[0], before[0])


@pytest.mark.parametrize("equation", ["bse->be", "bss->bs", "...e->e...", "abc,abc->abc", "ab...->ba..."])
def test_what_sums_multiplies_or_leaves_axes_unnamed_stays(equation: str) -> None:
    x = torch.randn(2, 4, 4)
    operands = equation.count(",") + 1
    captured, _ = capture_module(lambda x: torch.einsum(equation, *[x] * operands).sin(), x)
    gm = Runner().rewrite(NORMALISE, captured.gm, Context(captured.inputs))
    assert ops(gm)["aten.einsum.default"] == 1
