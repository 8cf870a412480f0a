"""The benchmarks of PARTIAL rows run, in their quick forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import branches, partial


@pytest.mark.slow
def test_every_row_of_the_digits_models_is_timed(tmp_path: Path) -> None:
    partial.main(["--narrow", "--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "partial_narrow.json").read_text())
    for name in ("DiT-MoE", "DSMoE"):
        assert set(written[name]["one_step"]) == {*partial.NARROW, *partial.WHOLE, *partial.WRITTEN_OUT}
        low, middle, high = written[name]["of_the_experts_time"]["tau 0.05"]
        assert 0 < low <= middle <= high


@pytest.mark.slow
def test_every_operator_of_a_layer_is_timed(tmp_path: Path) -> None:
    branches.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "branches.json").read_text())
    for name in branches.LAYERS:
        low, middle, high = written[name]["of_the_experts_time"]["branches_, tau 0.05"]
        assert 0 < low <= middle <= high
