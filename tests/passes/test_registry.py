"""Passes of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from moeca_compile.errors import InvariantError, OptionError
from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.options import Options
from moeca_compile.passes import register, unregister
from moeca_compile.passes.facts import Facts
from moeca_compile.pipeline import FIND, NORMALIZE
from tests.tools import analyze_module, ops

W = torch.randn(4, 4)
X = torch.randn(2, 4)


def model(x: Tensor) -> Tensor:
    return x + torch.relu(torch.relu(x @ W))


def drop_second_relu(gm: GraphModule, ctx: Facts) -> GraphModule:
    for node in list(gm.graph.nodes):
        if node.target is aten.relu.default and fx.arg(node, 0).target is aten.relu.default:
            node.replace_all_uses_with(fx.arg(node, 0))
            gm.graph.erase_node(node)
    return gm


def no_op(gm: GraphModule, ctx: Facts) -> GraphModule:
    return gm


def find_nothing(gm: GraphModule, ctx: Facts) -> Facts:
    return ctx


def breaks_the_graph(gm: GraphModule, ctx: Facts) -> GraphModule:
    fx.output_node(gm).append(fx.placeholders(gm)[0])
    return gm


@pytest.fixture(autouse=True)
def leaves_none() -> Iterator[None]:
    yield
    for one in (drop_second_relu, no_op, find_nothing, breaks_the_graph):
        with suppress(OptionError):
            unregister(one.__name__)


def names(options: Options | None = None) -> list[str]:
    return [record.name for record in analyze_module(model, X, options=options or Options(inner="eager")).records]


def test_a_registered_pass_runs_in_its_place_until_it_is_taken_out() -> None:
    plain = names()
    assert register(drop_second_relu, stage="normalize", after="drop_noops") is drop_second_relu
    register(find_nothing, stage="find", after=FIND[-1].__name__)
    found = analyze_module(model, X, options=Options(inner="eager"))
    assert ops(found.gm)["aten.relu.default"] == 1
    place = plain.index("drop_noops") + 1
    assert [record.name for record in found.records] == [
        *plain[:place], "drop_second_relu", *plain[place:], "find_nothing",
    ]  # fmt: skip
    unregister("drop_second_relu")
    unregister("find_nothing")
    assert names() == plain


def test_without_a_place_it_is_the_first_of_its_stage_and_may_be_left_out() -> None:
    register(no_op, stage="normalize")
    assert names()[:2] == ["materialize_casts", "no_op"]
    assert "no_op" not in names(Options(inner="eager", disable=("no_op",)))


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    register(breaks_the_graph, stage="normalize", after=NORMALIZE[-1].__name__)
    with pytest.raises(InvariantError, match="pass breaks_the_graph failed"):
        names()


def test_mistakes_are_told() -> None:
    with pytest.raises(OptionError, match="stage='rewrit' is none of normalize, find, rewrite"):
        register(no_op, stage="rewrit")
    with pytest.raises(OptionError, match=r"expected a function \(gm, ctx\), and got int"):
        register(3, stage="find")  # type: ignore[type-var]
    register(no_op, stage="normalize", after="drop_nops")
    with pytest.raises(OptionError, match="a pass no_op is registered already"):
        register(no_op, stage="rewrite")
    with pytest.raises(
        OptionError, match=r"register\(no_op, after='drop_nops'\): stage normalize has materialize_casts, drop_noops"
    ):
        names()
    unregister("no_op")
    with pytest.raises(OptionError, match="no pass 'no_op' is registered"):
        unregister("no_op")
