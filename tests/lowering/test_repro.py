"""A refusal of Inductor's leaves a script that repeats it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moeca_compile as moeca
from moeca_compile.errors import LoweringError
from moeca_compile.lowering.inductor import repro
from tests import toy
from tests.models import DiT


def refuse(*args: Any, **keywords: Any) -> Any:
    raise RuntimeError('no "kernel"\nfor this')


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script that the error of a compile names."""
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.standalone_compile", refuse)
    tiny = DiT(depth=1, dim=8, heads=1, num_experts=2, top_k=1, hidden=4, size=4, channels=2)  # one test compiles it
    model = moeca.compile(tiny.eval().requires_grad_(False), schedule="full", disable=("repeat_blocks",))
    with torch.no_grad(), pytest.raises(LoweringError, match="Inductor refused variant v0") as error:
        toy.sample(model, 0)
    named = re.search(r"`python (\S+)` repeats it; please attach that file to a report", str(error.value))
    assert named is not None
    return Path(named[1])


@pytest.mark.slow
def test_the_script_runs(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert 'no "kernel"' in script.read_text()
    monkeypatch.setattr(sys, "argv", [str(script), "--eager"])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == "ran: [(3, 2, 4, 4)]\n"
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(RuntimeError, match='no "kernel"'):
        runpy.run_path(str(script), run_name="__main__")


def test_the_script_has_no_weights(script: Path) -> None:
    assert script.stat().st_size < 200_000
    assert max(len(line) for line in script.read_text().splitlines()) < 5_000


@pytest.mark.slow
def test_the_script_compiles_what_inductor_takes(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.stdout == "ran: [(3, 2, 4, 4)]\n", done.stderr


def test_a_graph_that_cant_be_written_leaves_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(repro, "_folder", lambda: tmp_path / "gone")
    graph = torch.fx.symbolic_trace(torch.nn.Identity())
    assert repro.write_repro("v0", graph, [torch.ones(2)], {}, ValueError("no")) is None
