"""`moeca compare`: a model, a pipeline and a bundle at the command line, and arguments that don't go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeca_compile.cli import app
from moeca_compile.errors import MoecaError

MODEL = ("tests.toy:model", "--sample", "tests.toy:sample", "--inner", "eager", "--seeds", "1")


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["compare", *words])
    if isinstance(done.exception, MoecaError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_model_is_compared_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said = run(*MODEL, "--schedule", "uniform:2", "--picture", str(tmp_path / "pairs.png"))
    assert said.startswith("DiT, schedule uniform:2, order 1, 1 seeds")
    assert "times as fast (graph " in said
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_json_is_json() -> None:
    data = json.loads(run(*MODEL, "--json"))
    assert data["schedule"] == "uniform:3, order 1"
    assert [contender["name"] for contender in data["contenders"]] == ["plain", "computed", "cached"]
    assert data["mac_fraction"] < 1


@pytest.mark.slow
def test_a_pipeline_is_compared_by_prompts() -> None:
    words = ("tests.docs.world:Pipeline", "--inner", "eager", "--steps", "6", "--seeds", "2")
    data = json.loads(run(*words, "--prompt", "a fox", "--prompt", "a hare", "--json"))
    assert data["model"] == "Pipeline"
    assert data["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("tests.toy:model",), "give --sample MODULE:FUNCTION, or --prompt for a pipeline"),
        ((*MODEL, "--prompt", "a fox"), "give --sample MODULE:FUNCTION, or --prompt for a pipeline"),
        (("moeca_compile", *MODEL[1:]), "this folder is no bundle: it has no"),
        (("toy", *MODEL[1:]), "'toy': expected MODULE:FUNCTION, as in my.models:build, or the folder of a bundle"),
        ((*MODEL, "--steps", "4"), "--steps is for the pipeline that --prompt calls"),
        ((*MODEL, "--schedule", "uniform"), "schedule 'uniform' is not understood"),
        ((*MODEL, "--truth", "converged"), "give it a keyword steps"),
        (("tests.toy:model", "--prompt", "a fox", "--inner", "eager"), "prompts are for a pipeline, and this is DiT"),
    ],
)
def test_arguments_that_do_not_go_together(words: tuple[str, ...], text: str) -> None:
    with pytest.raises(MoecaError, match=text):
        run(*words)
