"""The runner: what passes get, what is recorded and dumped, and who is named when something fails."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from moeca_compile.errors import CaptureError, InvariantError, OptionError
from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.lowering.inductor.split_table import split_table
from moeca_compile.options import Options
from moeca_compile.passes.facts import Facts, Roles
from moeca_compile.passes.manager import PassManager, PassRecord
from moeca_compile.passes.transform.materialize_casts import materialize_casts
from moeca_compile.passes.transform.plain_einsum import plain_einsum
from moeca_compile.pipeline import FIND, HOIST, LOWER_INDUCTOR, NORMALIZE, OPTIONAL, REWRITE, WITH_PROLOGUES
from tests.tools import analyze_module, build, capture_module, ops, row, schedule_of

W = torch.randn(4, 4)


def model(x: Tensor) -> Tensor:
    return x + (x @ W).detach()


@pytest.fixture
def gm() -> GraphModule:
    return capture_module(model, torch.randn(2, 4))[0].gm


CONTEXT = Facts(())
NOTHING = "nothing to do. Does nothing where an axis is summed, repeated or left to an ellipsis."


def add_sine(gm: GraphModule, ctx: Facts) -> GraphModule:
    output = fx.output_node(gm)
    with gm.graph.inserting_before(output):
        (value,) = fx.nodes_of(output.args)
        output.args = ((fx.call(gm, aten.sin.default, (value,)),),)
    return gm


def drop_detach(gm: GraphModule, ctx: Facts) -> GraphModule:
    for node in list(gm.graph.nodes):
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    return gm


def mark_all(gm: GraphModule, ctx: Facts) -> GraphModule:
    for node in gm.graph.nodes:
        node.meta["seen"] = True
    return gm


def name_roles(gm: GraphModule, ctx: Facts) -> Facts:
    return replace(ctx, roles=Roles(latent="x"))


def count_again(gm: GraphModule, ctx: Facts) -> Facts:
    return replace(ctx, macs=((ctx.roles.latent, len(gm.graph.nodes)),))


def finds_nothing_new(gm: GraphModule, ctx: Facts) -> Facts:
    """Does nothing, ever."""
    return ctx


def divides_by_zero(gm: GraphModule, ctx: Facts) -> GraphModule:
    raise ZeroDivisionError("oops")


def finds_nothing(gm: GraphModule, ctx: Facts) -> Facts:
    raise KeyError("missing")


def refuses(gm: GraphModule, ctx: Facts) -> GraphModule:
    raise CaptureError("not this model")


def turns_the_graph_round(gm: GraphModule, ctx: Facts) -> GraphModule:
    fx.output_node(gm).append(fx.placeholders(gm)[0])
    return gm


# -- what passes get and what comes out --------------------------------------------------------------------------------


def test_rewriters_run_in_order_each_on_the_result_of_the_one_before(gm: GraphModule) -> None:
    result = PassManager().rewrite((drop_detach, add_sine, add_sine), gm, CONTEXT)
    assert ops(result) == {"aten.matmul.default": 1, "aten.add.Tensor": 1, "aten.sin.default": 2}
    assert "sin" in result.code


def test_the_given_graph_stays_as_it_is(gm: GraphModule) -> None:
    before = [(node.format_node(), dict(node.meta)) for node in gm.graph.nodes]
    code = gm.code
    PassManager().rewrite((drop_detach, mark_all, add_sine), gm, CONTEXT)
    assert [(node.format_node(), dict(node.meta)) for node in gm.graph.nodes] == before
    assert gm.code == code


def test_a_pass_gets_names_values_and_graph_facts(gm: GraphModule) -> None:
    gm.meta["fact"] = 1
    seen: list[GraphModule] = []

    def look(twin: GraphModule, ctx: Facts) -> GraphModule:
        seen.append(twin)
        return twin

    PassManager().rewrite((look,), gm, CONTEXT)
    (twin,) = seen
    assert twin is not gm
    assert twin.meta == {"fact": 1}
    assert [n.name for n in twin.graph.nodes] == [n.name for n in gm.graph.nodes]
    pairs = list(zip(twin.graph.nodes, gm.graph.nodes, strict=True))
    assert all(a.meta is not b.meta and a.meta.get("val") is b.meta.get("val") for a, b in pairs)


def test_finders_hand_their_context_on(gm: GraphModule) -> None:
    context = PassManager().find((name_roles, count_again), gm, CONTEXT)
    assert context.macs == (("x", len(gm.graph.nodes)),)


# -- records ----------------------------------------------------------------------------------------------------------


def test_every_pass_is_recorded_with_its_time_and_its_effect(gm: GraphModule) -> None:
    runner = PassManager()
    runner.find((name_roles,), gm, CONTEXT)
    runner.rewrite((drop_detach, add_sine), gm, CONTEXT, label="v3 ")
    size = len(gm.graph.nodes)
    assert [(r.name, r.nodes_before, r.nodes_after) for r in runner.records] == [
        ("name_roles", size, size),
        ("v3 drop_detach", size, size - 1),
        ("v3 add_sine", size - 1, size),
    ]
    assert all(0 < record.ms < 10_000 for record in runner.records)
    assert all(record.modified for record in runner.records)
    assert isinstance(runner.records[0], PassRecord)


def test_an_analysis_records_every_pass_of_the_page_in_order() -> None:
    analysis = analyze_module(model, torch.randn(2, 4))
    assert [record.name for record in analysis.records] == [one.__name__ for one in (*NORMALIZE, *FIND)]


def test_a_pass_that_changes_nothing_is_recorded_as_such(gm: GraphModule) -> None:
    runner = PassManager()
    runner.find((finds_nothing_new, name_roles), gm, CONTEXT)
    runner.rewrite((mark_all, drop_detach, drop_detach), gm, CONTEXT)
    assert [record.modified for record in runner.records] == [False, True, False, True, False]


# -- leaving passes out -----------------------------------------------------------------------------------------------


def test_a_disabled_pass_does_not_run_and_says_so(gm: GraphModule, caplog: pytest.LogCaptureFixture) -> None:
    runner = PassManager(disable=("add_sine",))
    with caplog.at_level(logging.INFO, logger="moeca_compile.passes.manager"):
        result = runner.rewrite((drop_detach, add_sine), gm, CONTEXT)
    assert "aten.sin.default" not in ops(result)
    assert [record.name for record in runner.records] == ["drop_detach"]
    assert "pass add_sine is disabled" in caplog.text


def test_the_pipeline_leaves_out_what_may_be_left_out() -> None:
    analysis = analyze_module(model, torch.randn(2, 4), options=Options(inner="eager", disable=("drop_noops",)))
    assert ops(analysis.gm)["aten.detach.default"] == 1
    assert "drop_noops" not in [record.name for record in analysis.records]


@pytest.mark.parametrize("name", [one.__name__ for one in (*FIND, *REWRITE) if one not in HOIST] + ["drop_nops", ""])
def test_a_pass_that_cannot_be_left_out_is_refused_by_name(name: str) -> None:
    known = re.escape(str(sorted(OPTIONAL)))
    with pytest.raises(OptionError, match=rf"disable=\['{name}'\]: only {known} can be left out"):
        analyze_module(model, torch.randn(2, 4), options=Options(inner="eager", disable=(name, "drop_noops")))


def test_what_normalizes_hoists_and_lowers_is_optional() -> None:
    needed = {materialize_casts, split_table}
    passes = (*NORMALIZE, *HOIST, *LOWER_INDUCTOR)
    assert {function.__name__ for function in passes if function not in needed} == OPTIONAL


# -- dumps ------------------------------------------------------------------------------------------------------------


def test_without_a_folder_nothing_is_written(gm: GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PassManager().rewrite((add_sine,), gm, CONTEXT)
    assert list(tmp_path.iterdir()) == []


def test_dumps_are_numbered_in_order_and_go_on_counting(gm: GraphModule, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    PassManager(folder).rewrite((drop_detach, add_sine), gm, CONTEXT)
    PassManager(folder).rewrite((add_sine,), gm, CONTEXT, label="v0 ")
    assert sorted(path.name for path in folder.glob("[0-9]*.txt")) == [
        "000_drop_detach.after.txt", "000_drop_detach.before.txt", "001_add_sine.after.txt",
        "001_add_sine.before.txt", "002_v0_add_sine.after.txt", "002_v0_add_sine.before.txt",
    ]  # fmt: skip


def test_a_dump_shows_the_graph_before_and_after(gm: GraphModule, tmp_path: Path) -> None:
    PassManager(tmp_path).rewrite((drop_detach, add_sine), gm, CONTEXT)
    texts = {path.name: path.read_text() for path in tmp_path.glob("[0-9]*.txt")}
    assert "aten.detach" in texts["000_drop_detach.before.txt"]
    assert "aten.detach" not in texts["000_drop_detach.after.txt"]
    assert texts["001_add_sine.before.txt"] == texts["000_drop_detach.after.txt"]
    assert "aten.sin" in texts["001_add_sine.after.txt"]
    assert "f32[2, 4]" in texts["001_add_sine.after.txt"]


def test_the_index_says_what_each_pass_did(gm: GraphModule, tmp_path: Path) -> None:
    runner = PassManager(tmp_path)
    runner.find((name_roles, finds_nothing_new), gm, CONTEXT)
    runner.rewrite((plain_einsum, drop_detach, mark_all), gm, CONTEXT)
    lines = (tmp_path / "index.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    size = len(gm.graph.nodes)
    assert [(row[0].strip("| "), row[1], row[2]) for row in rows] == [
        ("name_roles", f"{size} -> {size}", "found roles"),
        ("finds_nothing_new", f"{size} -> {size}", "found nothing. Does nothing, ever."),
        ("plain_einsum", f"{size} -> {size}", NOTHING),
        ("drop_detach", f"{size} -> {size - 1}", "changed"),
        ("mark_all", f"{size - 1} -> {size - 1}", "nothing to do."),
    ]  # fmt: skip
    assert rows[3][3] == "[before](001_drop_detach.before.txt) [after](001_drop_detach.after.txt) |"


@pytest.mark.parametrize("way", ["option", "path", "environment"])
def test_the_folder_comes_from_the_option_or_the_environment(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"option": str(tmp_path), "path": tmp_path, "environment": None}[way]
    monkeypatch.setenv("MOECA_DUMP", str(tmp_path) if way == "environment" else str(tmp_path / "unused"))
    analyze_module(model, torch.randn(2, 4), options=Options(inner="eager", dump=given))
    assert [path.name for path in sorted(tmp_path.glob("[0-9]*.txt"))] == [
        f"{i:03d}_{one.__name__}.{when}.txt" for i, one in enumerate(NORMALIZE) for when in ("after", "before")
    ]


def test_a_variant_s_passes_are_dumped_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analyze_module(model, torch.randn(2, 4))
    monkeypatch.setenv("MOECA_DUMP", str(tmp_path))
    schedule = schedule_of(analysis, "C", "F")
    build(analysis, schedule, row("F"))
    names = sorted(path.name for path in tmp_path.iterdir() if "before" in path.name)
    ran = [one for one in WITH_PROLOGUES.rewrite if one not in HOIST]
    assert names == [f"{i:03d}_v1_{one.__name__}.before.txt" for i, one in enumerate(ran)]


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failing_pass_is_named_with_its_error_and_those_before_it(gm: GraphModule) -> None:
    runner = PassManager()
    runner.find((name_roles,), gm, CONTEXT)
    with pytest.raises(InvariantError) as error:
        runner.rewrite((drop_detach, divides_by_zero, add_sine), gm, CONTEXT)
    assert "pass divides_by_zero failed: ZeroDivisionError('oops')" in str(error.value)
    assert "passes before it: name_roles, drop_detach" in str(error.value)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_failing_first_pass_has_none_before_it(gm: GraphModule) -> None:
    with pytest.raises(InvariantError, match=r"pass finds_nothing failed: KeyError.*passes before it: none"):
        PassManager().find((finds_nothing,), gm, CONTEXT)


def test_an_error_of_ours_comes_through_as_it_is(gm: GraphModule) -> None:
    with pytest.raises(CaptureError, match=r"^not this model$"):
        PassManager().rewrite((refuses,), gm, CONTEXT)


def test_a_pass_that_leaves_a_broken_graph_is_named(gm: GraphModule) -> None:
    with pytest.raises(InvariantError, match=r"(?s)pass turns_the_graph_round failed: .*passes before it: add_sine"):
        PassManager().rewrite((add_sine, turns_the_graph_round), gm, CONTEXT)


def test_passes_before_are_named_up_to_six(gm: GraphModule) -> None:
    with pytest.raises(InvariantError) as error:
        PassManager().rewrite((*[add_sine] * 9, divides_by_zero), gm, CONTEXT)
    assert str(error.value).count("add_sine") == 6
