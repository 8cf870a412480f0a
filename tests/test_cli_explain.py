"""`moeca explain`: the text, the page, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moeca_compile.cli import app
from moeca_compile.errors import MoecaError
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.front import Front
from tests import toy


def with_inputs() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    return toy.model(), (torch.randn(3, 2, 4, 4), torch.full((3,), 1000.0), torch.tensor([1, 2, 3]))


def with_keywords() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model, inputs = with_inputs()
    return model, dict(zip(("x", "t", "y"), inputs, strict=True))


def run(*words: str) -> str:
    torch._dynamo.reset()
    done = CliRunner().invoke(app, ["explain", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def refused(*words: str) -> str:
    with pytest.raises(MoecaError) as error:
        CliRunner().invoke(app, ["explain", *words], catch_exceptions=False)
    return str(error.value)


def test_the_report_is_printed() -> None:
    for source in ("with_inputs", "with_keywords"):
        said = run(f"tests.test_cli_explain:{source}", "--schedule", "uniform:4")
        assert "blocks.1.moe  experts" in said
        assert "schedule uniform:4, order 1" in said
    assert json.loads(run("tests.test_cli_explain:with_inputs", "--json"))["model"] == "DiT"


@pytest.mark.slow
def test_a_page_with_times_of_a_sampled_model(tmp_path: Path) -> None:
    schedules = [Schedule.uniform(2), Schedule.uniform(3)]
    for number, schedule in enumerate(schedules):
        predicted = {"mac_fraction": 0.5, "psnr_db": 40.0 + number}
        Schedule(schedule.rows, order=1, period=schedule.period, predicted=predicted).save(tmp_path / f"{number}.json")
    Front(tuple(Schedule.load(tmp_path / f"{number}.json") for number in (0, 1))).save(tmp_path / "front.json")
    page = tmp_path / "report.html"
    said = run(
        "tests.toy:model", "--sample", "tests.toy:sample", "--schedule", str(tmp_path / "0.json"), "--html", str(page),
        "--beside", str(tmp_path / "1.json"), "--beside", str(tmp_path / "front.json"),
    )  # fmt: skip
    assert said.endswith("report.html in a browser\n")
    data = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
    assert [len(step["calls"]) for step in data["steps"]] == [1] * 8
    assert len(data["measured"]["front"]["other schedules"]) == 3
    assert len(data["measured"]["front"]["this schedule"]) == 1


@pytest.mark.slow
def test_what_cannot_be_explained_is_said(tmp_path: Path) -> None:
    source = "tests.test_cli_explain:with_inputs"
    no_inputs = refused("tests.toy:model")
    assert "expected a function that returns (model, example_inputs), and it returned DiT. Add --sample" in no_inputs
    assert "moeca explain tests.toy:model --sample tests.toy:sample" in no_inputs
    assert refused(source, "--steps", "9").startswith("--steps: these are for the page: add --html")
    assert "there is no folder" in refused(source, "--html", str(tmp_path / "nowhere" / "report.html"))
    page = str(tmp_path / "report.html")
    assert "holds no calibration" in refused(source, "--html", page, "--calibration", str(tmp_path))
    assert "2 uncached and 0 cached" in refused(source, "--html", page, "--uncached", "a.png", "--uncached", "b.png")
