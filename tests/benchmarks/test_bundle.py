"""The bundle benchmark runs, in its quick form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bundle


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path: Path) -> None:
    bundle.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "bundle.json").read_text())
    assert written["export"]["bundle_over_weights_and_graphs"] < 1.02
    assert written["memory"]["shared"]["variants"] == 3
    assert written["memory"]["shared"]["weights_take_over_weights"] < 1.1
    assert written["memory"]["speed"]["weights_take"] > written["memory"]["shared"]["weights_take"]
    assert list(written["time"]) == list(bundle.PROVIDERS)
    for one in written["time"].values():
        assert 0 < one["mac_fraction"] < 0.5
        assert one["speedup"] > 1
