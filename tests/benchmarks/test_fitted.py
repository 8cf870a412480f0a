"""The benchmark of fitted output weights: its table is that of the committed figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import fitted


@pytest.mark.parametrize(("task", "file"), [("digits", "fitted"), ("glyphs", "fitted_glyphs")])
def test_the_page_shows_the_committed_figures(task: str, file: str, tmp_path: Path) -> None:
    page, mark = tmp_path / "fitted.md", fitted.MARKS[task]
    page.write_text(f"before\n{mark}\nold\n{mark}\nafter")
    fitted.report(Path(f"benchmarks/results/{file}.json"), page)
    table = page.read_text().split(mark)[1]
    assert table in Path("docs/fitted.md").read_text()
    assert "old" not in page.read_text()


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path: Path) -> None:
    fitted.main(["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    lines = json.loads((tmp_path / "fitted.json").read_text())["lines"]
    assert [line["computed"] for line in lines] == [50, 10, 10, 10, 10]
    nearest = max(lines, key=lambda line: line["psnr_db"]["converged"][0])
    assert nearest["name"] == "output, fitted to converged"
