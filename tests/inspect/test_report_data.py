"""The data of the report's page, and the page as a file: what is in it, and that no text of a model becomes markup."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moeca_compile as moeca
from moeca_compile.errors import ScheduleError, UserError
from moeca_compile.graph.regions import Rejected
from moeca_compile.inspect.html.data import page_data
from moeca_compile.inspect.html.graphs import PassGraphs, interned
from moeca_compile.inspect.html.measured import Measured
from moeca_compile.inspect.html.page import page
from moeca_compile.inspect.report import Report
from moeca_compile.schedule.adaptive import Adaptive
from tests import toy
from tests.inspect.reported import KEYS, report, with_rows
from tests.passes.blocks import Block, Routed, Stack, Timed, latent, times
from tests.sampling import compiled, dit, plain, run


def embedded(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    data = json.loads(match[1])
    assert isinstance(data, dict)
    return data


def does(data: Mapping[str, Any], step: int) -> list[str]:
    return [data["actions"][act]["name"] for act in data["rows"][data["steps"][step]["row"]]]


# -- the data ---------------------------------------------------------------------------------------------------------


def test_each_step_says_what_each_region_does() -> None:
    data = page_data(with_rows("CCCC", "FFFF", "RCFC"))
    assert [region["key"] for region in data["regions"]] == KEYS
    assert [does(data, step) for step in range(len(data["steps"]))] == [
        ["compute"] * 4, ["forecast"] * 4, ["reuse", "compute", "forecast", "compute"],
    ]  # fmt: skip


def test_experts_and_their_router_are_there() -> None:
    data = page_data(report())
    assert [(region["kind"], region["experts"], region["top_k"]) for region in data["regions"]] == [
        ("attention", 0, 0), ("experts", 4, 2), ("attention", 0, 0), ("experts", 4, 2),
    ]  # fmt: skip
    assert 0 < sum(region["share"] for region in data["regions"]) < 1


def test_partial_rows_have_their_name() -> None:
    data = page_data(with_rows("CCCC", "FaFa"))
    assert does(data, 1)[1].startswith("partial(")
    assert data["actions"][-1]["kind"] == "partial"


def test_a_schedule_that_repeats_is_shown_for_50_steps_or_as_asked() -> None:
    assert len(page_data(report())["steps"]) == 50
    data = page_data(report(), steps=7)
    assert [does(data, step)[0] for step in range(7)] == ["compute", *["forecast", "forecast", "compute"] * 2]


def test_steps_past_the_end_and_adaptive_rows_are_unknown() -> None:
    assert [step["row"] for step in page_data(with_rows("CCCC", "FFFF"), steps=3)["steps"]] == [0, 1, None]
    adaptive = with_rows("CCCC", "FFFF", adaptive=Adaptive((0.1,)))
    assert {step["row"] for step in page_data(adaptive)["steps"]} == {None}


def test_a_trajectory_gives_milliseconds_timesteps_and_the_rows_that_ran() -> None:
    torch._dynamo.reset()
    model = compiled(dit(), schedule="uniform:3")
    run(plain(model))
    data = page_data(moeca.explain(model))
    assert data["model"]["model"] == "DiT"
    assert [len(step["calls"]) for step in data["steps"]] == [1] * 10
    assert [step["timestep"] for step in data["steps"]] == [1000.0 - 80 * i for i in range(10)]
    assert [step["row"] for step in data["steps"]] == [0, 1, 1, 0, 1, 1, 0, 1, 1, 0]
    assert all(call["ms"] > 0 for step in data["steps"] for call in step["calls"])
    inputs = torch.randn(2, 4, 8, 8), torch.full((2,), 900.0), torch.tensor([1, 2])
    assert moeca.explain(model, *inputs).calls == moeca.explain(model).calls
    assert moeca.explain(model, *inputs, schedule="uniform:5").calls == ()  # they ran another schedule


def test_rejected_candidates_have_their_source_line() -> None:
    torch._dynamo.reset()
    body = Timed(Stack(Block("gate left", mlp=Routed()), around=True))
    (rejected,) = page_data(moeca.explain(body, latent(), times(), schedule="full", inner="eager"))["rejected"]
    assert rejected["where"].startswith("blocks.py:")
    number = int(rejected["where"].partition(":")[2])
    source = Path(__file__).parents[1] / "passes" / "blocks.py"
    assert rejected["code"] == source.read_text().splitlines()[number - 1].strip()


def test_front_and_families_come_from_the_schedule_file() -> None:
    predicted = {"mac_fraction": 0.4, "psnr_db": 50.0, "psnr_db_holdout": 49.0, "tried a": 50.0, "tried b": 51.0}
    other = with_rows("CCCC", "FFFF", predicted={"mac_fraction": 0.6, "psnr_db": 55.0}).schedule
    measured = Measured({"all": [float("nan"), 0.5]}, {"order-1": [(0.5, 52.0)]})
    data = page_data(
        with_rows("CCCC", "FFFF", predicted=predicted), measured=measured, others=[other, report().schedule]
    )
    assert data["measured"]["front"] == {
        "order-1": [[0.5, 52.0]], "other schedules": [[0.6, 55.0]], "this schedule": [[0.4, 49.0]],
    }  # fmt: skip
    assert [family["name"] for family in data["measured"]["tried"]] == ["b", "a"]
    assert data["measured"]["drift"] == {"all": [None, 0.5]}
    assert page_data(report())["measured"] == {"drift": {}, "front": {}, "tried": []}


# -- graphs of passes -------------------------------------------------------------------------------------------------


def test_each_line_and_each_graph_is_stored_once() -> None:
    graphs = [PassGraphs("p", "a\nb", "a\nc"), PassGraphs("same", "a\nc", "a\nc"), PassGraphs("q", "a\nc", "c")]
    assert interned(graphs) == {
        "lines": ["a", "b", "c"], "texts": [[0, 1], [0, 2], [2]], "passes": {"p": [0, 1], "q": [1, 2]}, "left_out": [],
    }  # fmt: skip


def test_graphs_that_are_too_long_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeca_compile.inspect.html.graphs.MAX_LINES", 4)
    graphs = [PassGraphs("p", "a\nb", "a\nc"), PassGraphs("q", "a\nc", "d")]
    assert interned(graphs)["left_out"] == ["q"]


def test_a_page_has_the_graphs_of_the_passes(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = compiled(dit(), schedule="uniform:3")
    inputs = torch.randn(2, 4, 8, 8), torch.full((2,), 900.0), torch.tensor([1, 2])
    found = moeca.explain(model, *inputs, html=tmp_path / "report.html")
    assert {"v0 insert_state", "v1 drop_dead"} <= {graphs.name for graphs in found.pass_graphs}
    data = embedded((tmp_path / "report.html").read_text())
    before, after = ([data["graphs"]["lines"][line] for line in data["graphs"]["texts"][text]]
                     for text in data["graphs"]["passes"]["v1 drop_dead"])  # fmt: skip
    assert len(after) < len(before)
    assert moeca.explain(model, *inputs).pass_graphs == ()
    run(plain(model), 2)
    last = moeca.explain(model, html=tmp_path / "last.html")
    assert "v1 drop_dead" in embedded((tmp_path / "last.html").read_text())["graphs"]["passes"]
    assert len(last.calls) == 2


@pytest.mark.slow
def test_the_graphs_are_in_a_folder_that_was_asked_for_too(tmp_path: Path) -> None:
    torch._dynamo.reset()
    inputs = torch.randn(2, 2, 4, 4), torch.full((2,), 500.0), torch.tensor([1, 2])
    dump, html = tmp_path / "graphs", tmp_path / "report.html"
    for _ in range(2):  # the folder holds the graphs of the first time too
        found = moeca.explain(toy.model().eval(), *inputs, schedule="uniform:3", inner="eager", dump=dump, html=html)
    assert len(list(dump.glob("*.before.txt"))) == 2 * len(found.pass_graphs)


# -- the page ---------------------------------------------------------------------------------------------------------

HOSTILE = "</script><img src=x onerror=alert(1)><!-- \" ' \u2028 \ud800"


def test_a_name_cannot_end_the_script() -> None:
    named = replace(report(), model=HOSTILE, rejected=(Rejected(HOSTILE, HOSTILE, HOSTILE, HOSTILE),))
    text = page(page_data(named), str(named))
    assert embedded(text)["model"]["model"] == HOSTILE
    assert "<img" not in text
    assert text.count("</script>") == 2


def test_the_page_asks_the_network_for_nothing() -> None:
    text = page(page_data(report()), "")
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "{{" not in text


def test_browsers_without_scripts_get_the_text() -> None:
    assert "blocks.1.moe  experts" in page(page_data(report()), str(report()))


def test_a_report_of_a_broken_graph_has_a_page(tmp_path: Path) -> None:
    Report.of_parts(3, "the graph breaks in 3 parts").to_html(tmp_path / "report.html")
    assert embedded((tmp_path / "report.html").read_text())["model"]["breaks"] == "the graph breaks in 3 parts"


def test_images_are_in_the_page(tmp_path: Path) -> None:
    from PIL import Image

    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    images[0].save(tmp_path / "red.webp")
    report().to_html(tmp_path / "report.html", uncached=[images[0], tmp_path / "red.webp"], cached=images)
    first, second = embedded((tmp_path / "report.html").read_text())["pairs"]
    assert second["uncached"].startswith("data:image/webp;base64,")
    content = base64.b64decode(first["cached"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(content)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ({"uncached": ["a.png"]}, "1 uncached and 0 cached; give as many of each"),
        ({"uncached": [3], "cached": [3]}, "int is no image; give images of PIL"),
        ({"uncached": ["none.png"], "cached": ["none.png"]}, "image 'none.png' can't be read: No such file"),
        ({"uncached": [__file__], "cached": [__file__]}, "is no PNG, JPEG, GIF or WebP file"),
    ],
)
def test_what_is_no_pair_of_images_is_refused(tmp_path: Path, images: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        report().to_html(tmp_path / "report.html", **images)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report '.*report.html' can't be written: No such file"):
        report().to_html(tmp_path / "nowhere" / "report.html")


# -- what a calibration kept ------------------------------------------------------------------------------------------


def test_measurements_are_those_of_the_calibration(tmp_path: Path) -> None:
    kept, model = tmp_path / "kept", toy.model().eval()
    schedule = moeca.calibrate(
        model, toy.sample, budget="macs:0.6", granularity="region", order=1, seeds=2, holdout=0, inner="eager",
        resume=kept, progress=False, max_variants=2,
    )  # fmt: skip
    inputs = torch.randn(3, 2, 4, 4), torch.full((3,), 1000.0), torch.tensor([1, 2, 3])
    found = moeca.explain(model, *inputs, schedule=schedule, inner="eager")
    measured = moeca.measurements(kept, found)
    assert len(measured.drift["all regions, 1 old"]) == 8
    points = [point for line in measured.front.values() for point in line]
    chosen = schedule.predicted["mac_fraction"], schedule.predicted["psnr_db"]
    assert any(point == pytest.approx(chosen, rel=1e-3) for point in points)
    with pytest.raises(ScheduleError, match="holds no calibration for granularity 'stack'"):
        moeca.measurements(kept, replace(found, schedule=replace(schedule, granularity="stack")))
    with pytest.raises(ScheduleError, match="holds the calibration of something else: graph is"):
        moeca.measurements(kept, replace(found, fingerprint="another"))
