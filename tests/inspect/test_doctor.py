"""The doctor: trials end as they should, whatever happens in them, and what it says can be read and pasted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moeca_compile import __version__
from moeca_compile.cli import app
from moeca_compile.inspect.doctor import diagnosis, programs
from moeca_compile.inspect.doctor.diagnosis import diagnose
from moeca_compile.inspect.doctor.extras import USES, missing_in
from moeca_compile.inspect.doctor.machine import machine, packages
from moeca_compile.inspect.doctor.trials import INDUCTOR, TRIALS, Outcome, Result, Trial, run_trial

FOUND = [
    Result("torch", Outcome.WORKS, "2.13.0", "", True),
    Result("OpenVINO", Outcome.MISSING, "No module named 'openvino'", "pip install it", False),
]
BROKEN = [Result("torch", Outcome.FAILS, "killed by SIGILL.", "pip install torch", True)]


@pytest.mark.parametrize(
    ("program", "outcome", "says"),
    [
        ("print('first')\nprint('3.2, fine')", Outcome.WORKS, "3.2, fine"),
        ("import no_such_package", Outcome.MISSING, "No module named 'no_such_package'"),
        ("raise ValueError('it is\\nbroken')", Outcome.FAILS, "broken"),
        ("assert 1 == 2", Outcome.FAILS, "AssertionError"),
        ("raise SystemExit('a.cpp:1: fatal error')", Outcome.FAILS, "a.cpp:1: fatal error"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", Outcome.FAILS, "killed by SIGKILL"),
        ("import time; time.sleep(60)", Outcome.FAILS, "no answer in"),
    ],
)
def test_a_trial_ends(program: str, outcome: Outcome, says: str) -> None:
    result = run_trial(Trial("name", program, "do this"), seconds=0.5 if "sleep" in program else 60)
    assert result.outcome is outcome
    assert says in result.text
    assert result.remedy == ("" if outcome is Outcome.WORKS else "do this")


def test_onnxruntime_is_tried_with_a_graph() -> None:
    result = run_trial(next(trial for trial in TRIALS if trial.name == "onnxruntime"))
    assert (result.outcome, "a graph ran on CPUExecutionProvider" in result.text) == (Outcome.WORKS, True)


def test_the_graph_of_the_trials_is_what_it_is_said_to_be() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_model_from_string(bytes.fromhex(programs.DOUBLE))
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), model.opset_import[0].version) == ("Add", ["x", "x"], 20)


@pytest.mark.slow  # Inductor compiles; .ci/run has it
def test_compile_tries_inductor() -> None:
    result = run_trial(INDUCTOR)
    assert (result.outcome, result.remedy) == (Outcome.WORKS, "")
    assert result.text.startswith("a small function was compiled in ")


def test_inductor_is_tried_on_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def trial(trial: Trial) -> Result:
        asked.append(trial.name)
        return Result(trial.name, Outcome.WORKS, "found", "", trial.needed)

    monkeypatch.setattr("moeca_compile.inspect.doctor.trials.run_trial", trial)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    *_, last = json.loads(done.stdout)["results"]
    assert (last["name"], last["outcome"]) == ("Inductor", "not tried")
    assert "moeca doctor --compile" in last["text"]
    assert "Inductor" not in asked
    done = CliRunner().invoke(app, ["doctor", "--compile", "--json"])
    *_, last = json.loads(done.stdout)["results"]
    assert (last["name"], last["outcome"], done.exit_code) == ("Inductor", "works", 0)


def test_programs_are_python() -> None:
    for trial in (*TRIALS, INDUCTOR):
        compile(trial.program, trial.name, "exec")


def test_the_machine_is_described_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    facts = machine()
    assert {"Python", "system", "processor", "vector instructions"} <= facts.keys()
    assert all(facts.values())
    assert "numpy" in packages()


def test_another_system_is_described_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*args: Any, **keywords: Any) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert machine()["vector instructions"] == "unknown"


def test_extras_say_what_they_lack() -> None:
    missing = missing_in(
        ["numpy", "no-such-package; extra == 'onnx'", 'numpy>=1; extra == "onnx"', "never-heard-of; extra == 'lint'"]
    )
    assert missing == {extra: ["no-such-package"] * (extra == "onnx") for extra in USES}


def doctor(monkeypatch: pytest.MonkeyPatch, results: list[Result], *words: str) -> tuple[int, str]:
    monkeypatch.setattr(diagnosis, "run_trials", lambda with_inductor: results)
    monkeypatch.setattr(diagnosis, "missing_of_extras", lambda: {"onnx": ["onnxscript"], "cli": []})
    done = CliRunner().invoke(app, ["doctor", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def test_doctor_prints_what_works_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, said = doctor(monkeypatch, FOUND)
    assert status == 0
    for text in (__version__, "vector instructions", "2.13.0", "missing", "pip install it", "lacks onnxscript"):
        assert text in said
    assert said.endswith("next: moeca doctor --report, for a bug report\n")


def test_doctor_exits_1_where_nothing_can_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor(monkeypatch, BROKEN)[0] == 1
    assert not diagnose("0").healthy


def test_doctor_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    status, said = doctor(monkeypatch, FOUND, "--json")
    report = json.loads(said)
    assert (status, report["healthy"], report["version"]) == (0, True, __version__)
    assert [result["outcome"] for result in report["results"]] == ["works", "missing"]


def test_the_report_is_one_block_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = doctor(monkeypatch, FOUND, "--report")[1].strip().split("\n")
    assert (lines[0], lines[-1]) == ("```text", "```")
    assert "OpenVINO: missing. No module named 'openvino'" in lines
