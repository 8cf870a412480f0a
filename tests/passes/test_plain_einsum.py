"""An einsum that sums nothing is a permute or an elementwise product; every other einsum stays what it is."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.passes.facts import Facts
from moeca_compile.passes.manager import PassManager
from moeca_compile.pipeline import NORMALIZE
from tests.tools import capture_module, ops, run_graph, same

SIZES = {"b": 2, "s": 3, "e": 5, "d": 4}


def operands(equation: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    given = equation.replace(" ", "").split("->")[0].split(",")
    return [torch.randn([SIZES.get(letter, 2) for letter in one.replace(".", "")]) for one in given]


@pytest.mark.parametrize(
    ("equation", "left"),
    [
        ("b s e -> b e s", {"aten.permute.default": 1}),
        ("bse->sbe", {"aten.permute.default": 1}),
        ("seb", {"aten.permute.default": 1}),
        ("bse -> bse", {}),
        ("bs,bse->bse", {"aten.unsqueeze.default": 1, "aten.mul.Tensor": 1}),
        ("bse,bsed->bsed", {"aten.unsqueeze.default": 1, "aten.mul.Tensor": 1}),
        ("bse,be->ebs", {"aten.permute.default": 2, "aten.unsqueeze.default": 1, "aten.mul.Tensor": 1}),
        ("b,s->sb", {"aten.unsqueeze.default": 2, "aten.mul.Tensor": 1}),
    ],
)
def test_what_sums_nothing_is_written_out_bit_for_bit(equation: str, left: dict[str, int]) -> None:
    captured, args = capture_module(lambda *given: torch.einsum(equation, *given).sin(), *operands(equation))
    before = run_graph(captured.gm, args)
    gm = PassManager().rewrite(NORMALIZE, captured.gm, Facts(captured.inputs))
    assert ops(gm) == {"aten.sin.default": 1, **left}
    assert same(run_graph(gm, args)[0], before[0])


@pytest.mark.parametrize("equation", ["bse->be", "bb->b", "...e->e...", "bse,ed->bsd", "bs,bs", "bs,bs,bs->bs"])
def test_what_sums_or_leaves_axes_unnamed_stays(equation: str) -> None:
    captured, _ = capture_module(lambda *given: torch.einsum(equation, *given).sin(), *operands(equation))
    gm = PassManager().rewrite(NORMALIZE, captured.gm, Facts(captured.inputs))
    assert ops(gm)["aten.einsum.default"] == 1
