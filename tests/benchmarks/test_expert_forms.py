"""The benchmarks of expert forms and of opsets run, in their quick form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import expert_forms, opsets


@pytest.mark.slow
def test_every_form_is_measured_or_refused(tmp_path: Path) -> None:
    expert_forms.main(["--quick", "--out", str(tmp_path)])
    forms = json.loads((tmp_path / "expert_forms.json").read_text())["small"]["forms"]
    exact = ["segments", "dense", "moe", "moe of K"]
    for name in (*(f"onnxruntime, {form}" for form in exact), "OpenVINO, segments", "OpenVINO, dense"):
        assert forms[name]["relative_error"] < 1e-5
        assert forms[name]["bytes"] > 0
    assert 1e-4 < forms["onnxruntime, qmoe of 8 bits"]["relative_error"] < 0.05
    assert "refused" in forms["OpenVINO, moe"]


@pytest.mark.slow
def test_every_opset_is_measured(tmp_path: Path) -> None:
    opsets.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "opsets.json").read_text())
    for name in opsets.MODELS:
        graphs = written[name]["graphs"]
        assert graphs["opset 23"]["nodes"] < graphs["opset 20"]["nodes"]
        assert graphs["opset 23"]["operators"]["Attention"] > 0
        assert list(written[name]["step"]) == list(opsets.PROVIDERS)
