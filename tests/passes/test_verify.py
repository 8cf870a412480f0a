"""What is checked after every pass: values, states, results. A pass that breaks the graph is named."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from moeca_compile.errors import InvariantError
from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.variant import Slot, StateSlot
from moeca_compile.passes.facts import Facts, RewriteRequest
from moeca_compile.passes.manager import Pass, PassManager
from moeca_compile.passes.transform.ports import Ports
from moeca_compile.passes.verify import changes_outputs
from tests.graphs import graph_of

X = torch.randn(2, 4)
LAYOUT = (StateSlot("state_000", 0, 0, Slot.Y0, (2, 4), "float32", "cpu", 32),)
REQUEST = RewriteRequest(Facts(()), layout=LAYOUT)


def graph() -> GraphModule:
    return graph_of(lambda x, y: (x.sin() + 1, (y @ y.t()).cos()), X, X)


def node_of(gm: GraphModule, target: object) -> torch.fx.Node:
    return next(node for node in gm.graph.nodes if node.target is target)


def says_another_dtype(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    node = node_of(gm, aten.sin.default)
    node.meta["val"] = node.meta["val"].double()
    return gm


def keeps_a_stale_value(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    node = node_of(gm, aten.matmul.default)
    node.args = (node.args[0], node.args[0])
    return gm


def forgets_to_refresh(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    node = node_of(gm, aten.add.Tensor)
    with gm.graph.inserting_before(node):
        row = fx.call(gm, aten.select.int, (node.args[0], 0, 0))
    node.args = (row, *node.args[1:])
    return gm


def loses_a_result(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    output = fx.output_node(gm)
    output.args = (output.args[0][:1],)  # type: ignore[index]
    return gm


def turns_results_round(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    output = fx.output_node(gm)
    output.args = (tuple(reversed(output.args[0])),)  # type: ignore[arg-type]
    return gm


def gives_other_results(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    output = fx.output_node(gm)
    with gm.graph.inserting_before(output):
        flat = fx.call(gm, aten.flatten.using_ints, (output.args[0][0],))  # type: ignore[index]
    output.args = ((flat, *output.args[0][1:]),)  # type: ignore[index]
    return gm


def reads_a_state_of_nobody(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.placeholder("state_007")
    return gm


def writes_a_state_of_another_shape(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    ports = Ports(gm, request.layout, 1)
    ports.write(0, 0, Slot.Y0, node_of(gm, aten.cos.default))
    ports.finish()
    return gm


def writes_its_state(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    ports = Ports(gm, request.layout, 1)
    ports.write(0, 0, Slot.Y0, node_of(gm, aten.sin.default))
    ports.finish()
    return gm


@changes_outputs
def may_lose_a_result(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    return loses_a_result(gm, request)


BROKEN = {
    says_another_dtype: r"sin is float32 \[2, 4\], but its node says float64 \[2, 4\]",
    keeps_a_stale_value: r"can't be computed: aten\.\w+\.default on float32 \[2, 4\], float32 \[2, 4\] raises",
    forgets_to_refresh: r"add is float32 \[4\], but its node says float32 \[2, 4\]",
    loses_a_result: "the graph gave 2 results, now it gives 1",
    turns_results_round: r"its results \['add', 'cos'\] come in another order: \['cos', 'add'\]",
    gives_other_results: r"result 0 was float32 \[2, 4\], now flatten_using_ints is float32 \[8\]",
    reads_a_state_of_nobody: "state_007 is read, and the layout has no such state",
    writes_a_state_of_another_shape: r"state_000: written as float32 \[2, 2\], the layout says float32 \[2, 4\]",
}


@pytest.mark.parametrize(("one", "says"), BROKEN.items(), ids=[one.__name__ for one in BROKEN])
def test_a_pass_that_breaks_the_graph_is_named_with_what_is_wrong(one: Pass[RewriteRequest], says: str) -> None:
    with pytest.raises(InvariantError, match=f"pass {one.__name__} broke the graph: .*{says}.*passes before it: none"):
        PassManager(verify=True).rewrite((one,), graph(), REQUEST)


@pytest.mark.parametrize("one", [writes_its_state, may_lose_a_result])
def test_what_is_allowed_passes(one: Pass[RewriteRequest]) -> None:
    PassManager(verify=True).rewrite((one,), graph(), REQUEST)


def test_the_folder_of_the_dump_is_named_and_has_the_broken_graph(tmp_path: Path) -> None:
    manager = PassManager(tmp_path, verify=True)
    with pytest.raises(InvariantError, match=f"the graphs are in {re.escape(str(tmp_path))}"):
        manager.rewrite((writes_its_state, forgets_to_refresh), graph(), REQUEST)
    assert "aten.select.int" in (tmp_path / "001_forgets_to_refresh.after.txt").read_text()


def test_without_a_dump_the_error_says_how_to_get_one() -> None:
    with pytest.raises(InvariantError, match="MOECA_DUMP=folder writes the graphs there"):
        PassManager(verify=True).rewrite((loses_a_result,), graph(), REQUEST)


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_turns_it_on(value: str | None, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["MOECA_VERIFY"]  # in all of these tests
    monkeypatch.delenv("MOECA_VERIFY")
    if value is not None:
        monkeypatch.setenv("MOECA_VERIFY", value)
    assert PassManager().verify is on
    if not on:
        PassManager().rewrite((loses_a_result,), graph(), REQUEST)
