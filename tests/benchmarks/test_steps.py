"""`make bench` runs, in its quick form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import steps


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path: Path) -> None:
    steps.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "steps.json").read_text())
    assert set(written["one_step"]) > {steps.SHIPPED, steps.FULL, steps.COMPUTED, steps.FORECAST, steps.REUSED}
    assert len(written["targets"]) == 6
    assert written["graphs"][steps.SHIPPED]["graph_breaks"] > 0
    assert written["graphs"][steps.FULL]["graph_breaks"] == 0
