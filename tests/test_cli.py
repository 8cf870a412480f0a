"""`moeca`, command by command: what is printed, the exit status, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeca_compile.cli import app
from moeca_compile.schedule import Schedule
from tests.tools import row

ONE = Schedule((row("CC"), row("FF"), row("CF")), ("attn", "moe"), order=1, made_by="by hand")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    ONE.save(tmp_path / "one.json")
    replace(ONE, rows=(row("CC"), row("FF"), row("CC"))).save(tmp_path / "two.json")
    return str(tmp_path / "one.json"), str(tmp_path / "two.json")


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stdout


def test_show(files: tuple[str, str]) -> None:
    status, said = run("show", files[0])
    assert status == 0
    assert "by hand" in said
    assert "█▒█" in said


def test_show_as_json_is_json(files: tuple[str, str]) -> None:
    status, said = run("show", files[0], "--json")
    assert status == 0
    assert json.loads(said)["variants"] == 3


def test_show_draws(files: tuple[str, str], tmp_path: Path) -> None:
    assert run("show", files[0], "--picture", str(tmp_path / "grid.svg"))[0] == 0
    assert "<svg" in (tmp_path / "grid.svg").read_text()


def test_diff_says_what_differs_and_exits_1(files: tuple[str, str]) -> None:
    status, said = run("diff", *files)
    assert status == 1
    assert "step 2, moe" in said
    status, said = run("diff", *files, "--json")
    assert status == 1
    assert json.loads(said)["cells"] == [[2, "moe", "FORECAST", "COMPUTE"]]


def test_diff_of_equals_exits_0(files: tuple[str, str]) -> None:
    assert run("diff", files[0], files[0]) == (0, "the same\n")


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    command = [sys.executable, "-c", "from moeca_compile.cli import main; main()", "show", str(tmp_path / "no.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("moeca: not a readable schedule")
    assert done.stderr.count("\n") == 1
