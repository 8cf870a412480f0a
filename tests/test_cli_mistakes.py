"""No command ends in a traceback, and none obeys what a foreign file says to a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from moeca_compile import __version__, cli
from moeca_compile import planner as study
from moeca_compile.cli.say import print_json, say, show
from moeca_compile.runtime.bundle.summary import visible
from moeca_compile.schedule import Schedule
from tests import toy
from tests.tools import row

Capture = pytest.CaptureFixture[str]
ZERO = np.full(1, np.float32(0))
ONE = Schedule((row("CC"), row("FR")), ("attn[0]", "[/moe]"), order=1, made_by="by hand")


def moeca(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit status of a command."""
    monkeypatch.setattr(sys, "argv", ["moeca", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code if isinstance(left.value.code, int) else 0


def broken() -> Any:
    raise ZeroDivisionError("in the user's\nown code")


def both() -> Any:
    return toy.model().eval(), (torch.zeros(1),)


RUN = ("--inputs", "{}/no.npz", "--out", "{}/out.npz")
FIND = ("--sample", "tests.toy:sample", "--budget", "macs:0.5", "--out", "{}/s.json")
ALONE = ("--seeds", "1", "--holdout", "0", "--granularity", "region", "--inner", "eager")
MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("nonsense",), "No such command"),
    (("show",), "Missing argument"),
    (("show", "{}/no.json"), "can't be read"),
    (("show", "{}/empty"), "can't be read"),
    (("show", "{}/one.json", "--picture", "{}/grid.nonsense"), "a picture's name ends in .png or .svg"),
    (("show", "{}/one.json", "--picture", "{}/no/grid.svg"), "there is no folder"),
    (("diff", "{}/one.json"), "Missing argument"),
    (("diff", "{}/one.json", "{}/text"), "not a readable schedule"),
    (("calibrate", "tests.toy", *FIND), "expected MODULE:FUNCTION"),
    (("calibrate", "tests.toy:nothing", *FIND), "can't be loaded"),
    (("calibrate", "tests.toy:modell", *FIND), "did you mean 'model'?"),
    (("calibrate", "tests.toy.model:build", *FIND), "'tests.toy' is a module, not a package"),
    (("calibrate", "tests.toy:sample", *FIND), "is sample(model, seed), but it is called with no arguments"),
    (("calibrate", "tests.toy:model", *FIND[2:], "--sample", "tests.toy:model"), "is called with (model, seed)"),
    (("calibrate", "tests.test_cli_mistakes:ONE", *FIND), "is no function but Schedule"),
    (("calibrate", "tests.test_cli_mistakes:row", *FIND), "TypeError: row() missing 1"),
    (("calibrate", "tests.test_cli_mistakes:broken", *FIND), "ZeroDivisionError: in the user's own code (test_cli"),
    (("calibrate", "tests.toy:model", *FIND[:-1], "{}/no/s.json"), "there is no folder"),
    (("calibrate", "tests.toy:model", *FIND, "--weights", "{}/no"), "'{}/no' does not exist"),
    (("calibrate", "tests.toy:model", *FIND, "--weights", "{}/text"), "can't be loaded into DiT"),
    (("calibrate", "tests.toy:model", *FIND, "--budget", "2x"), "did you mean speedup:2?"),
    (("calibrate", "tests.toy:model", *FIND, "--inner", "egaer"), "'egaer' is not one of 'inductor', 'eager'"),
    (("calibrate", "tests.toy:model", *FIND, "--perturb", "2"), "perturb needs resume=FOLDER"),
    (("calibrate", "tests.toy:model", *FIND, "--resume", "{}/text"), "it is no folder"),
    (("calibrate", "tests.toy:model", *FIND, "--order", "7"), "order"),
    (("calibrate", "tests.toy:model", *FIND, "--effort", "-1"), "effort=-1.0, expected a finite number of uncached"),
    (("calibrate", "tests.toy:model", *FIND, "--effort", "inf"), "effort=inf, expected a finite number"),
    (("calibrate", "tests.toy:model", *FIND, "--effort", "nan"), "effort=nan, expected a finite number of uncached"),
    (("calibrate", "tests.toy:model", *FIND, "--memory", "much"), "--memory much: expected bytes such as 64MiB"),
    (("calibrate", "tests.toy:model", *FIND, "--granularity", "atoms"), "atoms"),
    (("merge", "{}/all"), "Missing argument"),
    (("merge", "{}/all", "{}/empty"), "holds no calibration; name folders that were given as resume"),
    (("plan", "tests.toy:model", *FIND, "--resume", "{}/empty"), "with --resume: moeca calibrate tests.toy:model"),
    (("drift", "{}/empty"), "holds no calibration"),
    (("drift", "{}/empty", "--seeds", "0"), "--seeds"),
    (("drift", "{}/empty", "--gap", "2"), "add --sample"),
    (("export", "tests.toy:model", "{}/b"), "expected a function that returns (model, example_inputs)"),
    (("export", "tests.toy:model", "{}/empty"), "exists already"),
    (("export", "tests.toy:model", "{}/b", "--targets", "onnxruntime"), "expected one or several of onnx, openvino"),
    (("export", "tests.toy:model", "{}/b", "--schedule", "unifrom:3"), "unifrom:3"),
    (("export", "tests.toy:model", "{}/b", "--batches", "1"), "expected three numbers"),
    (("export", "tests.toy:model", "{}/b", "--granularity", "atoms"), "atoms"),
    (("export", "tests.toy:model", "{}/b", "--opset", "3"), "Invalid value for '--opset'"),
    (("export", "tests.test_cli_mistakes:both", "{}/b"), "can't be called with the example inputs"),
    (("verify", "{}/empty"), "manifest.json is missing"),
    (("verify", "{}/no"), "is no directory"),
    (("verify", "{}/empty", "--provider", "Nonsense"), "has no 'Nonsense'"),
    (("verify", "{}/empty", "--memory", "none"), "'none' is not one of 'speed', 'shared'"),
    (("verify", "{}/empty", "--threads", "-1"), "--threads"),
    (("info", "{}/text"), "is no directory"),
    (("refit", "{}/empty", "{}/text", "{}/b"), "manifest.json is missing"),
    (("refit", "{}/no", "{}/text", "{}/b"), "is no directory"),
    (("refit", "{}/empty", "{}/text"), "Missing argument 'NEW'"),
    (("run", "{}/empty", *RUN), "manifest.json is missing"),
    (("run", "{}/empty"), "Missing option"),
    (("run", "{}/empty", *RUN[:-1], "{}/no/out.npz"), "there is no folder"),
    (("bench", "{}/empty", "--steps", "0"), "--steps"),
    (("bench", "{}/empty", "--rounds", "0"), "--rounds"),
    (("bench", "{}/empty", "--batch", "-3"), "--batch"),
    (("bench", "{}/empty", "--steps", "many"), "--steps"),
    (("engines", "{}/empty"), "manifest.json is missing"),
    (("engines", "{}/empty", "--batches", "3,2,1"), "batch=(3, 2, 1)"),
    (("engines", "{}/empty", "--library", "tensorflow"), "'tensorflow' is not one of 'tensorrt', 'tensorrt-rtx'"),
    (("triton", "{}/empty", "{}/models"), "manifest.json is missing"),
    (("triton", "{}/empty", "{}/models", "--sequences", "0"), "--sequences"),
    (("triton", "{}/empty", "{}/models", "--max-batch", "-1"), "--max-batch"),
    (("compare", "tests.toy:model"), "sample"),
    (("compare", "tests.toy:model", *FIND[:2], "--schedule", "unifrom:3"), "unifrom:3"),
    (("compare", "tests.toy:modell", *FIND[:2]), "did you mean 'model'?"),
    (("compare", "{}/empty"), "this folder is no bundle: it has no manifest.json"),
    (("calibrate", "tests.toy:model", *FIND, "--truth", "true"), "--truth true: expected uncached, converged"),
    (("calibrate", "tests.toy:model", *FIND, "--truth", "{}/text"), "/text can't be read"),
    (("calibrate", "tests.toy:model", *FIND, "--truth", "{}/empty"), "/empty has no array; expected one array"),
    (("calibrate", "tests.toy:model", *FIND, "--truth", "{}/names.npz"), "names.npz has an array named 'cat'"),
    (("calibrate", "tests.toy:model", *FIND, "--truth", "{}/few.npz"), "truth has no samples for seed 1; give them"),
    (("calibrate", "tests.toy:model", *FIND, *ALONE, "--truth", "{}/nan.npz"), "for seed 0 aren't all finite"),
    (("calibrate", "tests.toy:model", *FIND, "--budget", "2x"), "did you mean speedup:2?"),
    (("explain", "tests.toy:modell"), "did you mean 'model'?"),
    (("explain", "tests.toy:model", "--schedule", "unifrom:3"), "unifrom:3"),
    (("explain", "tests.toy:model", "--steps", "3"), "--steps: these are for the page: add --html report.html"),
    (("explain", "tests.toy:model", "--html", "{}/no/r.html"), "there is no folder"),
    (("doctor", "now"), "Got unexpected extra argument"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=lambda one: " ".join(one) if isinstance(one, tuple) else "")
def test_a_mistake_gives_one_line(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("text")
    ONE.save(tmp_path / "one.json")
    for name, arrays in {"names": {"cat": ZERO}, "few": {"0": ZERO}, "nan": {"0": ZERO * np.nan}}.items():
        np.savez(tmp_path / name, **arrays)
    assert moeca(monkeypatch, *(word.format(tmp_path) for word in words)) in (cli.MISTAKE, cli.UNEXPECTED)
    said = capsys.readouterr().err
    assert says.format(tmp_path) in said
    assert "Traceback" not in said
    assert said.count("\n") == 1 or "Usage: moeca" in said


def test_every_command_is_tried() -> None:
    assert {words[0] for words, _ in MISTAKES} == {"nonsense"} | set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_a_traceback_on_demand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ZeroDivisionError):
        moeca(monkeypatch, "export", "tests.test_cli_mistakes:broken", tmp_path / "b")


WITHOUT_TORCH = """
import sys
from moeca_compile import cli
sys.modules["torch"] = None
for words in {}:
    sys.argv = ["moeca", *words]
    try:
        cli.main()
    except SystemExit as left:
        print(left.code)
"""


def test_mistakes_are_said_before_torch_is_imported(tmp_path: Path) -> None:
    """What is wrong whatever the model is: were torch imported, the text would be that it isn't there."""
    find = [word.format(tmp_path) for word in FIND]
    words = [
        ["export", "math:pie", str(tmp_path)],
        ["export", "math:pi", str(tmp_path)],
        ["export", "tests.toy:modell", str(tmp_path / "b")],
        ["export", "tests.toy:model", str(tmp_path / "b"), "--schedule", "unifrom:3"],
        ["calibrate", "tests.toy:model", *find, "--budget", "2x"],
        ["calibrate", "tests.toy:model", *find, "--granularity", "atoms"],
        ["calibrate", "tests.toy:model", *find, "--order", "7"],
        ["calibrate", "tests.toy:model", *find[:-1], str(tmp_path / "no" / "s.json")],
        ["drift", "tests.toy:model", "--sample", "tests.toy:nothing"],
        ["drift", str(tmp_path)],
        ["verify", str(tmp_path)],
        ["refit", str(tmp_path), str(tmp_path / "w"), str(tmp_path / "b")],
    ]
    command = [sys.executable, "-c", WITHOUT_TORCH.format(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2"] * len(words), done.stderr
    assert "needs torch" not in done.stderr
    good = [["calibrate", "tests.toy:model", *find]]
    command = [sys.executable, "-c", WITHOUT_TORCH.format(good)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr.count("\n")) == ("2\n", 1)
    assert "this command needs torch, which isn't installed here" in done.stderr


def test_help_and_version(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for words in (("-h",), ("bench", "-h"), ("--version",)):
        assert moeca(monkeypatch, *words) == 0
    assert f"moeca-compile {__version__}\n" in capsys.readouterr().out


def test_calibrate_takes_what_export_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(study, "calibrate", lambda model, sample, **rest: seen.append(model) or ONE)
    words = ("calibrate", "tests.test_cli_mistakes:both", *(word.format(tmp_path) for word in FIND))
    assert CliRunner().invoke(cli.app, words, catch_exceptions=False).exit_code == 0
    assert isinstance(seen[0], torch.nn.Module)


def test_an_interrupted_calibration_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    def stopped(*args: Any, **rest: Any) -> Any:
        stop = KeyboardInterrupt()
        stop.add_note("the same call goes on from there")
        raise stop

    monkeypatch.setattr(study, "calibrate", stopped)
    words = (word.format(tmp_path) for word in ("calibrate", "tests.toy:model", *FIND))
    assert moeca(monkeypatch, *words) == 130
    assert "the same call goes on from there" in capsys.readouterr().err


EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\x85[red]\\"


def test_what_a_file_says_to_a_terminal_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ONE.save(tmp_path / "one.json")
    keys = (f"{EVIL}attn", f"{EVIL}moe[/]")
    replace(ONE, made_by=EVIL, fingerprint=EVIL, regions=keys, predicted={EVIL: 1.0}).save(tmp_path / "two.json")
    (tmp_path / "three.json").write_text(json.dumps({"format": EVIL}))
    for words in (("show", "two.json"), ("diff", "one.json", "two.json"), ("show", "three.json"), ("show", EVIL)):
        moeca(monkeypatch, words[0], *(tmp_path / word for word in words[1:]))
        said = "".join(capsys.readouterr())
        assert "owned" in said.replace("\n", "").replace(" ", "")
        own = said.replace("\x1b[0m", "").replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[36m", "")
        assert not {one for one in own if not one.isprintable()} - {"\n"}


def test_what_is_printed_stays_what_it_is(capsys: Capture) -> None:
    show("a [bold]name[/bold] :smile:", "")
    say("x" * 300)
    assert capsys.readouterr().out == "a [bold]name[/bold] :smile:\n\n" + "x" * 300 + "\n"
    assert visible("é漢 █░\n") == "é漢 █░\n"
    assert visible("a\tb\x00\ud800\u200b") == "a\\tb\\x00\\ud800\\u200b"


def test_json_has_no_numbers_that_json_does_not_have(capsys: Capture) -> None:
    print_json({"NaNet": float("nan"), "Infinity": [float("inf"), -float("inf"), {"x": (1.5, "NaN", None, True)}]})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"NaNet": None, "Infinity": [None, None, {"x": [1.5, "NaN", None, True]}]}
