"""What caching adds to output forecasts: the same full steps for all, gains by sample, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import beyond_output, fitted
from benchmarks.beyond_output import CHEAP, FITTED, OF_REGIONS, OUTPUT, full, gain, schedules
from benchmarks.fitted import computed
from benchmarks.tasks import DIGITS


def run(family: str, setting: str, macs: float, *levels: float) -> dict[str, Any]:
    return {"family": family, "setting": setting, "macs": macs, "psnr_db": list(levels)}


def test_all_families_compute_the_same_steps_in_full(tmp_path: Path) -> None:
    found = schedules(("blocks.0.attn", "blocks.0.moe"), fitted.Bench(fitted.QUICK, tmp_path), (4,))
    assert {family for family, _ in found} == {OUTPUT, *CHEAP}
    assert {computed(schedule) for schedule in found.values()} == {sum(full(step, 4) for step in range(50))}
    assert [step for step in range(12) if full(step, 4)] == [0, 1, 5, 9]
    assert len(found) == 2 + 2 * 2 + 2 * 1


def test_a_gain_is_over_the_mixture_that_costs_as_much() -> None:
    base = [run(OUTPUT, "a", 0.2, 40, 50), run(OUTPUT, "b", 0.4, 50, 52), run(OUTPUT, "worse", 0.3, 10, 10)]
    mean, half = gain(run("x", "y", 0.3, 48, 54), base) or (0, 0)
    assert mean == pytest.approx(((48 - 45) + (54 - 51)) / 2)
    assert half == pytest.approx(0)
    assert gain(run("x", "y", 0.5, 60, 60), base) is None


def test_the_better_order_is_told() -> None:
    region = next(iter(CHEAP))
    runs = [
        run(OUTPUT, "every 4th, order 1", 0.3, 40, 42), run(OUTPUT, "every 2th, order 1", 0.5, 50, 52),
        run(region, "every 4th, order 1", 0.4, 43, 45), run(region, "every 4th, order 2", 0.4, 46, 48),
    ]  # fmt: skip
    result = beyond_output.result_of(DIGITS, runs)
    (line,) = [line for line in result["lines"] if line["family"] == region]
    assert line["setting"] == "every 4th, order 2"
    assert line[f"gain over {OUTPUT}"] == [pytest.approx(1), pytest.approx(0)]
    assert line[f"gain over {FITTED}"] is None
    assert beyond_output.rows_of(result)[-1][-2:] == ["+1.0 ± 0.0", ""]


@pytest.mark.parametrize("file", sorted(Path("benchmarks/results").glob("beyond_output*.json")), ids=str)
def test_the_page_shows_the_committed_figures(file: Path, tmp_path: Path) -> None:
    mark = beyond_output.MARKS[json.loads(file.read_text())["task"]]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{mark}\nold\n{mark}\nafter")
    beyond_output.report(file, page)
    assert page.read_text().split(mark)[1] in Path("docs/branch-caching.md").read_text()


@pytest.mark.slow
def test_quick_run_writes_every_figure_and_goes_on(tmp_path: Path) -> None:
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--fitted", str(tmp_path), "--out", str(tmp_path)]
    beyond_output.main(arguments)
    first = json.loads((tmp_path / "beyond_output.json").read_text())["lines"]
    assert {line["family"] for line in first} == {OUTPUT, FITTED, *CHEAP, *OF_REGIONS.values()}
    shares = {line["family"]: line["macs"] for line in first}
    assert shares[OUTPUT] < shares["attention and experts forecast"] < shares["experts forecast, attention computed"]
    beyond_output.main(arguments)
    assert json.loads((tmp_path / "beyond_output.json").read_text())["lines"] == first
