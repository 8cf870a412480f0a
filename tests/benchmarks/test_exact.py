"""`python -m benchmarks.exact` runs, in its quick form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import exact
from benchmarks.exact_report import page


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path: Path) -> None:
    exact.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "exact.json").read_text())
    assert set(written["computed"]) == {exact.SHIPPED, exact.PREPARED, *exact.FORMS}
    assert len(written["reused"]) == 3
    assert written["mac_fraction"]["full"] == 1.0
    assert 0.2 < written["mac_fraction"]["interval 6"] < written["mac_fraction"]["interval 2"] < 0.7
    assert len(written["targets"]) == 3 + len(exact.INTERVALS) + 2
    exact.main(["--quick", "--again", "reused", "--out", str(tmp_path)])
    anew = json.loads((tmp_path / "exact.json").read_text())
    assert anew["reused"] != written["reused"]
    assert anew["runs"] == written["runs"]
    assert set(written["compile_seconds"]) == {exact.NEW, exact.SECOND}
    assert all(set(one) == {"1"} for kind in written["compile_seconds"].values() for one in kind.values())


def test_the_page_is_what_the_results_give() -> None:
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks" / "results" / "exact.json").read_text())
    assert (root / "docs" / "exact.md").read_text() == page(found)
