"""The pages are those that the committed results give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import report, tables
from benchmarks.protocol import RESULTS

ROOT = Path(__file__).parents[3]
REMEDY = "run python -m benchmarks.peers --report"


@pytest.fixture(scope="module")
def payload() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "peers.json").read_text())
    return found


def test_the_committed_page_is_what_the_results_give(payload: dict[str, Any]) -> None:
    assert (ROOT / report.PAGE).read_text() == report.page(payload), REMEDY


def test_the_committed_readme_has_the_table(payload: dict[str, Any]) -> None:
    readme = (ROOT / report.README).read_text()
    assert report.with_block(readme, report.block(payload)) == readme, REMEDY


def test_everything_is_written_anew_and_drawn(payload: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    page, picture, readme = report.write(payload, tmp_path)
    assert page.read_text() == report.page(payload)
    assert "<svg" in picture.read_text()
    assert readme.read_text().startswith("above\n" + report.BEGIN)
    assert "old" not in readme.read_text()
    assert readme.read_text().endswith(report.END + "\nbelow\n")


def test_a_readme_without_the_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        report.with_block("no markers", "new")


def test_every_figure_of_a_setting_is_there(payload: dict[str, Any]) -> None:
    for point in report.points_of(payload):
        assert point["finite"], point["family"]
        assert len(point["speedup_by_round"]) == payload["size"]["rounds"]
        assert 0 < point["macs"] <= 1.01
        assert point["uncached"]["psnr_db_worst"] <= point["uncached"]["psnr_db"]


def test_tables_have_as_many_cells_as_heads(payload: dict[str, Any]) -> None:
    points = report.points_of(payload)
    shown = [tables.equal_latency(points), tables.settings(points, 0.9), tables.families(payload["heats"])]
    for table in shown:
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
