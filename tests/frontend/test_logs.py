"""TORCH_LOGS and TORCH_TRACE: what the package tells there of a captured graph."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

import moeca_compile as moeca
from moeca_compile.engine import variant_cache
from moeca_compile.inspect import trace
from tests import toy

Captured = list[tuple[str, str, Any]]


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch) -> Captured:
    found: Captured = []

    def keep(name: str, text: Any, compile_id: Any) -> None:
        found.append((name, text(), compile_id))

    for module in (trace, variant_cache):
        monkeypatch.setattr(module, "artifact", keep)
    return found


def run() -> Any:
    torch._dynamo.reset()
    model = moeca.compile(toy.model().eval().requires_grad_(False), schedule="uniform:2", inner="eager")
    with torch.no_grad():
        toy.sample(model, 0)
    return model


def test_the_log_tells_what_was_captured(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "moeca_compile"):
        run()
    said = [
        (record.levelno, record.getMessage()) for record in caplog.records if record.name.startswith("moeca_compile")
    ]
    infos = [text for level, text in said if level == logging.INFO]
    assert any(text.startswith("captured ") and "4 regions" in text and "timestep t" in text for text in infos), infos
    assert any(text.startswith("v1: ") for text in infos)
    debugs = [text for level, text in said if level == logging.DEBUG]
    assert sum(text.startswith("region blocks.") for text in debugs) == 4


@pytest.mark.slow
def test_artifacts_belong_to_the_compile_that_they_are_of(artifacts: Captured) -> None:
    run()
    texts = {name: text for name, text, _ in artifacts}
    assert {"moeca_regions", "moeca_schedule", "moeca_graph", "moeca_v0", "moeca_v1"} <= texts.keys()
    assert "blocks.1.moe" in texts["moeca_regions"]
    assert "def forward" in texts["moeca_v1"]
    compiles = {str(compile_id) for _, _, compile_id in artifacts}
    assert len(compiles) == 1
    assert compiles != {"None"}


def test_an_artifact_is_torchs_structured_record(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    log = torch._logging._internal.trace_log
    texts: list[int] = []
    monkeypatch.setattr(log, "handlers", [])
    trace.artifact("silent", lambda: texts.append(1) or "", None)  # type: ignore[func-returns-value]
    assert not texts, "a text is made only if somebody listens"
    monkeypatch.setattr(log, "handlers", [Keep()])
    monkeypatch.setattr(log, "level", logging.DEBUG)
    monkeypatch.setattr(log, "propagate", False)
    compile_id = torch._guards.CompileId(frame_id=3, frame_compile_id=1)
    trace.artifact("moeca_regions", lambda: "one\ntwo", compile_id)
    trace.artifact("moeca_regions", lambda: "alone", None)
    inside, outside = records
    assert inside.metadata["artifact"] == {"name": "moeca_regions", "encoding": "string"}  # type: ignore[attr-defined]
    assert inside.payload == "one\ntwo"  # type: ignore[attr-defined]
    assert (inside.metadata["frame_id"], inside.metadata["frame_compile_id"]) == (3, 1)  # type: ignore[attr-defined]
    assert "frame_id" not in outside.metadata  # type: ignore[attr-defined]


def test_importing_every_package_ends_no_process() -> None:
    """torch does so for TORCH_LOGS="+moeca_compile", without typer and rich too."""

    code = "import sys; sys.modules['typer'] = sys.modules['rich'] = None; import moeca_compile.cli; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr
    code = "import sys; sys.modules['typer'] = None; from moeca_compile.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "moeca: the command line needs typer and rich: pip install 'moeca-compile[cli]'\n",
    )
