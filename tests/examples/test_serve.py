"""The serving example: digits from a bundle, in a process without torch, as good as torch's own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

serve = importlib.import_module("examples.04_serve_bundle")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("provider", ["CPUExecutionProvider", "openvino"])
def test_served_digits_are_torchs(provider: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve.main(["--json", "--bundle", str(tmp_path / "digits.moeca"), "--provider", provider])
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert figures["steps"] == 50
    assert not figures["torch_in_the_serving_process"]
    assert figures["psnr_db_to_torch_with_this_schedule"] >= 60
    assert figures["mac_fraction"] < 0.4
    assert figures["class_accuracy"] > 0.9
    assert figures["speedup"] > 1
