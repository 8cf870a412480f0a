"""`make demo` runs, in a short form, and its figures are in order."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

generate = importlib.import_module("examples.01_generate")


@pytest.mark.slow  # it compiles the digits model three times; .ci/run has it
def test_short_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    generate.main(["--json", "--runs", "1", "--picture", str(picture)])
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert figures["steps"] == 50
    assert 0.1 < figures["mac_fraction"] < 0.6
    assert figures["speedup"] > 1
    assert figures["speedup_caching"] > 1
    assert figures["speedup"] == pytest.approx(figures["speedup_prepared"] * figures["speedup_caching"])  # of one run
    assert figures["psnr_db"] > 20
    assert figures["state_bytes"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
