"""What holds for every command: an example that could be typed, --json, and a word about what Ctrl-C left."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moeca_compile import cli
from moeca_compile.cli import named
from moeca_compile.cli.command import add
from moeca_compile.errors import OptionError
from tests.bundle.conftest import call_of, small_model
from tests.docs.checks import check_command

COMMANDS: dict[str, Any] = {
    name: command
    for name, command in typer.main.get_command(cli.app).commands.items()  # type: ignore[attr-defined]
    if not command.hidden
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_is_one(name: str) -> None:
    lines = [line.strip() for line in COMMANDS[name].epilog.splitlines()]
    words = shlex.split(lines[lines.index("Example:") + 1])
    assert words[:2] == ["moeca", name]
    check_command(words)
    assert lines[-1] in CliRunner().invoke(cli.app, [name, "--help"]).stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_in_sentences(name: str) -> None:
    command = COMMANDS[name]
    assert len(command.help.split("\n")[0]) <= 62, "the list of commands would cut it short"
    for parameter in command.params:
        text = parameter.help
        assert text[0].isupper(), f"{parameter.name}: {text}"
        assert text.rstrip()[-1] in ".!", f"{parameter.name}: {text}"
        assert len(text.split()) >= 3, f"{parameter.name}: {text}"
    assert "json" in [parameter.name for parameter in command.params]


def test_completion() -> None:
    code = "from moeca_compile.cli import main; main()"
    variables = {**os.environ, "_MOECA_COMPLETE": "complete_bash", "COMP_WORDS": "moeca cal", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["calibrate"], done.stderr


def test_help_and_completion_wait_for_no_large_package() -> None:
    code = "import sys; import moeca_compile.cli.commands; print(*{'torch', 'numpy', 'rich'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "\n", done.stderr


def tiny() -> tuple[Any, Any]:
    return small_model(), call_of(2)


def stopped(where: Path, json: bool = False) -> None:
    """Stop."""
    raise KeyboardInterrupt


def noted(where: Path) -> None:
    """Stop, and say more."""
    stop = KeyboardInterrupt()
    stop.add_note("half of it is kept")
    raise stop


def test_ctrl_c_says_what_is_left() -> None:
    app = typer.Typer()
    add(app, stopped, example="moeca stopped out", if_stopped="nothing was written to {where}")
    add(app, noted, example="moeca noted out", if_stopped="nothing was written")
    done = CliRunner().invoke(app, ["stopped", "out"])
    assert (done.exit_code, done.stderr.strip()) == (130, "moeca: stopped; nothing was written to out")
    done = CliRunner().invoke(app, ["noted", "out"])
    assert (done.exit_code, done.stderr.strip()) == (130, "moeca: stopped; half of it is kept")


def test_a_function_is_found_without_importing_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "pack" / "deep").mkdir(parents=True)
    for folder in ("pack", "pack/deep"):
        (tmp_path / folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "pack" / "deep" / "mine.py").write_text(
        "raise RuntimeError('imported')\nif True:\n    def build(): ...\nfrom os import path as other\n"
        "def scaled(scale): ...\ndef either(scale=1, *more): ...\ndef strict(*, scale): ...\nLAMBDA = lambda: 1\n"
    )
    (tmp_path / "open.py").write_text("from os.path import *")
    (tmp_path / "bad.py").write_text("def (")
    for name in ("build", "other", "either", "LAMBDA"):
        named.check(f"pack.deep.mine:{name}", 0)
    named.check("pack.deep.mine:either", 2)
    named.check("open:join", 0)
    named.check("math:pi", 0)
    for source, arguments, says in (
        ("pack.deep.mine:scaled", 0, r"is scaled\(scale\), but it is called with no arguments"),
        ("pack.deep.mine:strict", 0, r"is strict\(scale\), but it is called with no arguments"),
        ("pack.deep.mine:scaled", 2, r"is scaled\(scale\), but it is called with \(model, seed\)"),
        ("pack.deep.mine:biuld", 0, "did you mean 'build'"),
        ("pack.deep.none:build", 0, "no module 'pack.deep.none'"),
        ("pack.deep.mine.build:build", 0, "'pack.deep.mine' is a module, not a package"),
        ("bad:build", 0, "can't be loaded"),
        ("pack", 0, "expected MODULE:FUNCTION"),
        (":build", 0, "expected MODULE:FUNCTION"),
    ):
        with pytest.raises(OptionError, match=says):
            named.check(source, arguments)
    assert not {"pack", "bad", "open"} & sys.modules.keys()


@pytest.mark.slow
def test_json_of_an_export_is_json(tmp_path: Path) -> None:
    words = ["export", "tests.test_cli_commands:tiny", str(tmp_path / "b"), "--schedule", "full", "--fixed-batch"]
    done = CliRunner().invoke(cli.app, [*words, "--json", "--triton", str(tmp_path / "models")])
    assert done.exit_code == 0, done.exception
    written = json.loads(done.stdout)
    assert (written["variants"], written["engines"], len(written["models"])) == (1, [], 1)
