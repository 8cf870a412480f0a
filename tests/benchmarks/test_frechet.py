"""The benchmark of Frechet distances: its intervals, its peers, its files, and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import fitted, frechet
from benchmarks.tasks import TASKS, Task
from examples import digits


def test_shifted_features_are_as_far_as_they_are_shifted() -> None:
    drawn = torch.randn(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    told = {frechet.EVERY_STEP: drawn + 0.1, "shifted": drawn + 0.3, frechet.SOLVED: drawn}
    every, shifted, solved = frechet.distances(told, drawn)
    assert shifted["real"][0] == pytest.approx(3 * 0.3**2, abs=1e-5)
    assert shifted[frechet.SOLVED] == [pytest.approx(3 * 0.3**2, abs=1e-5), pytest.approx(0, abs=1e-5)]
    assert shifted["real_less_uncached"][0] == pytest.approx(3 * (0.09 - 0.01), abs=1e-5)
    assert every["real_less_uncached"] == [0, 0]
    assert solved["real"][0] == pytest.approx(0, abs=1e-5)
    assert 0 < shifted["real"][1] < 0.3


def test_without_real_images_only_samples_are_compared() -> None:
    drawn = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (every,) = frechet.distances({frechet.EVERY_STEP: drawn}, None)
    assert every == {"name": frechet.EVERY_STEP}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_peers_are_the_nearest_to_each_truth(task: Task) -> None:
    lines = json.loads(Path(f"benchmarks/results/{task.results_of('peers_equal')}.json").read_text())["lines"]
    chosen = frechet.best_peers(task, 17)
    for truth, (name, setting) in zip(("uncached", "converged"), chosen, strict=True):
        (own,) = [line for line in lines if line["name"] == name and line["count"] == 17]
        others = [line for line in lines if line["count"] == 17 and line["kind"] != "moeca"]
        assert own["setting"] == setting
        assert own["psnr_db"][truth][0] == max(line["psnr_db"][truth][0] for line in others)


def test_features_are_kept_by_contender_mark_and_seed(tmp_path: Path) -> None:
    kept = frechet.Kept(tmp_path / "features", digits.load_classifier())
    name, label = "Adams-Bashforth 2, optimized times, 17", "17 steps"
    for seed in (1, 2):
        kept.add(kept.file(name, label, seed), digits.initial_noise(seed, 3))
    found = kept.features(name, label, [1, 2])
    assert found.shape == (6, 64)
    assert not torch.equal(found[:3], found[3:])
    assert [file.name for file in sorted((tmp_path / "features").iterdir())] == [
        f"adams_bashforth_2_optimized_times_17_17_steps_{seed}.npy" for seed in (1, 2)
    ]


def test_features_of_an_earlier_schedule_are_not_taken(tmp_path: Path) -> None:
    task = TASKS["digits"]
    bench = frechet.Bench(fitted.Bench(fitted.WHOLE, tmp_path, task), tmp_path)
    marks = {name: one.mark for name, one in bench.contenders(with_converged=True).items()}
    schedule = bench.schedules.schedule(34, fitted.UNCACHED)
    assert marks["moeca output, fitted to uncached, 17"] == fitted.mark_of(schedule)
    ours = [mark for name, mark in marks.items() if name.startswith("moeca")]
    assert len(set(ours)) == len(ours) == 4


@pytest.mark.parametrize("file", [path.stem for path in sorted(Path("benchmarks/results").glob("frechet*.json"))])
def test_the_page_shows_the_committed_figures(file: str, tmp_path: Path) -> None:
    results = Path(f"benchmarks/results/{file}.json")
    mark = frechet.MARKS[json.loads(results.read_text())["task"]]
    page = tmp_path / "fitted.md"
    page.write_text(f"before\n{mark}\nold\n{mark}\nafter")
    frechet.report(results, page)
    assert page.read_text().split(mark)[1] in Path("docs/fitted.md").read_text()
