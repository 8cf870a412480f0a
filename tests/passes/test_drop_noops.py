"""What computes nothing is dropped; what computes anything stays, and so does every bit of the result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.graph import fx
from moeca_compile.passes.facts import Facts
from moeca_compile.passes.manager import PassManager
from moeca_compile.passes.transform.drop_noops import drop_noops
from moeca_compile.pipeline import NORMALIZE
from tests.passes.blocks import Block, Routed, Timed, analyzed, latent, times
from tests.tools import EAGER, Options, analyze_module, capture_module, ops, run_graph, same

W = torch.randn(8, 8)
Model = Callable[[Tensor], Tensor]

DROPPED: dict[str, Model] = {
    "detach": lambda x: (x @ W).detach().sin(),
    "dropout out of training": lambda x: F.dropout(x @ W, 0.5, training=False).sin(),
    "dropout of nothing": lambda x: F.dropout(x @ W, 0.0, training=True).sin(),
    "cast to the same dtype": lambda x: (x @ W).to(torch.float32).sin(),
    "float of a float": lambda x: (x @ W).float().sin(),
    "cast to its own device": lambda x: (x @ W).to("cpu").sin(),
    "several in a row": lambda x: F.dropout((x @ W).detach().float(), 0.1, training=False).detach().sin(),
}
KEPT: dict[str, tuple[Model, str]] = {
    "dropout in training": (lambda x: F.dropout(x @ W, 0.5, training=True).sin(), "aten.dropout.default"),
    "cast to another dtype": (lambda x: (x @ W).to(torch.float64).sin(), "aten._to_copy.default"),
    "cast there and back": (lambda x: (x @ W).to(torch.bfloat16).float().sin(), "aten._to_copy.default"),
    "clone": (lambda x: (x @ W).clone().sin(), "aten.clone.default"),
    "a view": (lambda x: (x @ W).flatten(1).sin(), "aten.view.default"),
}


@pytest.mark.parametrize("model", DROPPED.values(), ids=DROPPED)
def test_what_computes_nothing_is_dropped(model: Model) -> None:
    captured, args = capture_module(model, latent())
    before = run_graph(captured.gm, args)
    gm = PassManager().rewrite(NORMALIZE, captured.gm, Facts(captured.inputs))
    assert ops(gm) == {"aten.matmul.default": 1, "aten.sin.default": 1}
    assert same(run_graph(gm, args)[0], before[0])


@pytest.mark.parametrize(("model", "kept"), KEPT.values(), ids=KEPT)
def test_what_computes_something_stays(model: Model, kept: str) -> None:
    captured, _ = capture_module(model, latent())
    gm = PassManager().rewrite(NORMALIZE, captured.gm, Facts(captured.inputs))
    assert ops(gm)[kept] == ops(captured.gm)[kept] >= 1


def test_assertions_of_the_tracer_are_dropped() -> None:
    captured, _ = capture_module(lambda x: (x @ W).double(), latent())
    assert ops(captured.gm)["aten._assert_tensor_metadata.default"] == 1
    assert "aten._assert_tensor_metadata.default" not in ops(drop_noops(captured.gm, Facts(captured.inputs)))


def test_dead_code_is_dropped_and_placeholders_stay() -> None:
    captured, _ = capture_module(lambda x, y: (x @ W, y.sin())[0], latent(), latent())
    gm = drop_noops(captured.gm, Facts(captured.inputs))
    assert ops(gm) == {"aten.matmul.default": 1}
    assert len(fx.placeholders(gm)) == len(captured.inputs)


def test_a_graph_without_them_stays_as_it_is() -> None:
    gm = analyzed().gm
    again = PassManager().rewrite(NORMALIZE, gm, analyzed().facts)
    assert [n.format_node() for n in again.graph.nodes] == [n.format_node() for n in gm.graph.nodes]


def test_a_residual_behind_them_is_seen() -> None:
    """Why the pass is there: x + detach(dropout(f(x))) is x + f(x)."""
    context = analyze_module(lambda x: x + F.dropout((x @ W).detach(), 0.5, training=False).float(), latent()).facts
    (branch,) = context.branches
    assert (branch.trunk, branch.cut) == ("x", "matmul")


def test_without_the_pass_results_are_the_same() -> None:
    """`disable` may leave it out: less may be found, nothing may change."""
    model = Timed(Block("gate left", mlp=Routed())).eval()
    x, t = latent(), times()
    left_out = analyze_module(model, x, t, options=Options(inner="eager", disable=("drop_noops",)))
    _, args = capture_module(model, x, t)
    with_it = analyze_module(model, x, t, options=EAGER)
    assert len(left_out.gm.graph.nodes) >= len(with_it.gm.graph.nodes)
    assert same(run_graph(left_out.gm, args)[0], run_graph(with_it.gm, args)[0])


def test_an_output_that_was_a_copy_stays_a_copy() -> None:
    """The caller may change what it gets in place; the input must not change with it."""
    captured, args = capture_module(lambda x: x.to(torch.float32, copy=True), latent())
    gm = PassManager().rewrite(NORMALIZE, captured.gm, Facts(captured.inputs))
    (result,) = run_graph(gm, args)
    assert result.data_ptr() != args[0].data_ptr()
