"""The benchmark of fitted output weights: its table is that of the committed figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import engines, few_steps, fitted, together, transfer

RESULTS = Path("benchmarks/results")
MADE_BY = {
    **{path.stem: engines for path in RESULTS.glob("engines*.json")},
    "fitted": fitted,
    "fitted_glyphs": fitted,
    "fitted_times": fitted,
    "fitted_times_glyphs": fitted,
    "together": together,
    "together_glyphs": together,
    "transfer": transfer,
    "transfer_glyphs": transfer,
}


@pytest.mark.parametrize("file", MADE_BY)
def test_the_page_shows_the_committed_figures(file: str, tmp_path: Path) -> None:
    results, module = Path(f"benchmarks/results/{file}.json"), MADE_BY[file]
    is_timed = file.startswith("fitted_times")
    marks = fitted.TIMES_MARKS if is_timed else module.MARKS
    page, mark = tmp_path / "fitted.md", marks[json.loads(results.read_text())["task"]]
    page.write_text(f"before\n{mark}\nold\n{mark}\nafter")
    module.report(results, page, **({"times": True} if is_timed else {}))
    table = page.read_text().split(mark)[1]
    assert table in Path("docs/fitted.md").read_text()
    assert "old" not in page.read_text()


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path: Path) -> None:
    fitted.main(["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    lines = json.loads((tmp_path / "fitted.json").read_text())["lines"]
    assert [line["computed"] for line in lines] == [50, 10, 10, 10, 10, 10]
    nearest = max(lines, key=lambda line: line["psnr_db"]["converged"][0])
    assert nearest["name"] == "output, fitted to converged"


def test_a_committed_schedule_is_taken_unless_calibrated_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitted, "KEPT", tmp_path / "schedules")
    work = tmp_path / "work"
    first = fitted.Bench(fitted.WHOLE, work)
    assert first.known(34, fitted.UNCACHED) is None
    (work / "uncached_34.json").write_text("{}")
    first.keep(fitted.KEPT)
    kept = fitted.KEPT / "digits_uncached_34.json"
    assert first.known(34, fitted.UNCACHED) == kept
    assert fitted.Bench(fitted.WHOLE, tmp_path / "other", again=True).known(34, fitted.UNCACHED) is None
    assert fitted.Bench(fitted.QUICK, tmp_path / "other").known(34, fitted.UNCACHED) is None  # another calibration
    fitted.Bench(fitted.QUICK, work).keep(tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_quick_run_compares_both_fits(tmp_path: Path) -> None:
    together.main(["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    lines = json.loads((tmp_path / "together.json").read_text())["lines"]
    assert [(line["truth"], line["computed"]) for line in lines] == [("uncached", 10)] * 2 + [("converged", 10)] * 2
    assert [line["name"] for line in lines] == ["step by step", "together"] * 2
    assert all(("lead_db" in line) == (line["name"] == "together") for line in lines)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_quick_run_has_the_same_quality_on_each_engine(tmp_path: Path) -> None:
    engines.main(["--quick", "--fitted", str(tmp_path / "work"), "--out", str(tmp_path)])
    torch, *others = json.loads((tmp_path / "engines.json").read_text())["lines"]
    assert [line["engine"] for line in others] == ["onnxruntime", "OpenVINO"]
    for line in others:
        assert line["psnr_db"][0] == pytest.approx(torch["psnr_db"][0], abs=0.05)
        assert line["to_torch_db"][0] > torch["psnr_db"][0] + 10


@pytest.mark.slow
def test_quick_transfer_tells_guidance(tmp_path: Path) -> None:
    transfer.main(["--quick", "--fitted", str(tmp_path / "work"), "--out", str(tmp_path)])
    here, elsewhere = json.loads((tmp_path / "transfer.json").read_text())["lines"]
    assert (here["warned"], elsewhere["warned"]) == (False, True)


@pytest.mark.parametrize("file", [path.stem for path in sorted(Path("benchmarks/results").glob("few_steps*.json"))])
def test_the_page_of_few_steps_shows_the_committed_figures(file: str, tmp_path: Path) -> None:
    results = Path(f"benchmarks/results/{file}.json")
    mark = few_steps.MARKS[json.loads(results.read_text())["task"]]
    page = tmp_path / "few-steps.md"
    page.write_text(f"before\n{mark}\nold\n{mark}\nafter")
    few_steps.report(results, page)
    assert page.read_text().split(mark)[1] in Path("docs/few-steps.md").read_text()
