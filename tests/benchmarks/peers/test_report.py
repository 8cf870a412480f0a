"""The pages are those that the committed results give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.peers import report, speed, tables
from benchmarks.protocol import RESULTS

ROOT = Path(__file__).parents[3]
REMEDY = "run python -m benchmarks.peers --report"


@pytest.fixture(scope="module")
def payloads() -> dict[str, report.Payload]:
    return report.load(RESULTS)


@pytest.fixture(scope="module")
def payload(payloads: dict[str, report.Payload]) -> report.Payload:
    return payloads["digits"]


def test_the_committed_page_is_what_the_results_give(payloads: dict[str, report.Payload]) -> None:
    assert (ROOT / report.PAGE).read_text() == report.pages(payloads), REMEDY


def test_the_committed_readme_has_the_table(payload: report.Payload) -> None:
    readme = (ROOT / report.README).read_text()
    assert report.with_block(readme, report.block(payload)) == readme, REMEDY


def test_everything_is_written_anew_and_drawn(payloads: dict[str, report.Payload], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    page, picture, readme = report.write(payloads, tmp_path)
    assert page.read_text() == report.pages(payloads)
    assert "<svg" in picture.read_text()
    assert readme.read_text().startswith("above\n" + report.BEGIN)
    assert "old" not in readme.read_text()
    assert readme.read_text().endswith(report.END + "\nbelow\n")


def test_a_readme_without_the_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        report.with_block("no markers", "new")


def test_a_table_that_lacks_a_contender_says_so(payload: report.Payload) -> None:
    points = [one for one in report.points_of(payload) if not one["family"].startswith("TeaCache")]
    for made in (tables.both_truths, tables.causes):
        with pytest.raises(ValueError, match="TeaCache-like: not measured yet"):
            made(points)


def test_every_figure_of_a_setting_is_there(payload: report.Payload) -> None:
    for point in report.points_of(payload):
        assert point["finite"], point["family"]
        assert len(point["speedup_by_round"]) == payload["size"]["rounds"]
        assert 0 < point["macs"] <= 1.01
        assert point["uncached"]["psnr_db_worst"] <= point["uncached"]["psnr_db"]


def test_tables_have_as_many_cells_as_heads(payload: report.Payload) -> None:
    points = report.points_of(payload)
    shown = [tables.equal_latency(points), tables.settings(points, 0.9), tables.families(payload["heats"])]
    for table in shown:
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


SPEED = {
    "model": "a model", "size": {"digits": 1, "rounds": 2, "steps": 8}, "left_out": {"Nobody": "it wasn't there"},
    "heats": {
        "speed": {
            "load_1min": [0.1, 1.2],
            "families": {
                "eager, as shipped": {"graphs": 0, "graph_breaks": 0},
                "moeca uniform, order 1": {"graphs": 2, "graph_breaks": 0},
            },
            "points": [
                {
                    "family": "eager, as shipped", "setting": "", "seconds": 2.0, "speedup": 0.5, "macs": 1.0,
                    "speedup_by_round": [0.4, 0.6], "state_bytes": 0, "compile_seconds": None, "relative_l2": 0.0,
                },
                {
                    "family": "moeca uniform, order 1", "setting": "N=2", "seconds": 0.5, "speedup": 1.9, "macs": 0.5,
                    "speedup_by_round": [1.8, 2.0], "state_bytes": 3_000_000, "told_bytes": 2_000_000,
                    "compile_seconds": 12.3, "relative_l2": 0.25,
                },
                {
                    "family": "moeca uniform, order 1", "setting": "N=4", "seconds": 0.3, "speedup": 3.2, "macs": 0.25,
                    "speedup_by_round": [3.2, 3.2], "state_bytes": 3_000_000, "told_bytes": 2_000_000,
                    "compile_seconds": 0.2, "relative_l2": 0.5,
                },
            ],
        },
    },
}  # fmt: skip


def test_a_section_on_speed_says_what_was_measured(payload: report.Payload) -> None:
    text = speed.sections({"digits": payload, "s2": SPEED})
    assert "## DiT-MoE-S/2\n" in text
    assert "| moeca uniform, order 1, N=2 | 0.50 | 1.90 (1.80 to 2.00) | 3.80 | 50.0% | 3.00 | 2.00 | 12.3 |" in text
    assert "| 12.3 | 2 | 0 | 0.25 |" in text
    assert "x share of the MACs, moeca uniform: N=2 0.95, N=4 0.80." in text
    assert "- Nobody: it wasn't there." in text
    assert report.pages({"digits": payload, "s2": SPEED}) == report.page(payload) + text


def test_without_other_models_the_page_is_that_of_the_digits(payload: report.Payload) -> None:
    assert report.pages({"digits": payload}) == report.page(payload)
