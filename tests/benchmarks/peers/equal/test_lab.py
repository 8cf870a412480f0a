"""How settings are chosen and told: the best of those that are cheap enough, drawn once, paired with ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.fitted import CONVERGED, UNCACHED
from benchmarks.peers.equal import measure, page, roster
from benchmarks.peers.equal.equal_time import steps_in_our_time
from benchmarks.peers.equal.lab import Contender, Lab, Setting, Size
from benchmarks.peers.workload import Batch
from benchmarks.protocol import RESULTS
from benchmarks.tasks import DIGITS, GLYPHS, TASKS, Task

ROOT = Path(__file__).parents[4]
SIZE = Size(steps=4, finer=2, counts=(10,), seeds=1, each=2, held_out=2, batch=2)
IMAGES = torch.linspace(-1, 1, 2 * 256).view(2, 1, 16, 16)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(SIZE, {10: [0, 2]}, tmp_path)
    lab.__dict__["recorded"] = {truth: ([IMAGES], []) for truth in (UNCACHED, CONVERGED)}
    with torch.no_grad():
        yield lab


def setting(label: str, off: float, evaluations: float) -> Setting:
    def draw(batch: Batch) -> Tensor:
        return IMAGES + off

    return Setting(label, draw, lambda: (evaluations, evaluations / 4))


def contender(*settings: Setting) -> Contender:
    return Contender("a family", "cache", UNCACHED, "settings", lambda lab, count: settings)


def test_the_nearest_of_those_that_are_cheap_enough_is_chosen(lab: Lab) -> None:
    near, far, dear = setting("near", 0.1, 2), setting("far", 0.2, 1), setting("dear", 0.0, 3)
    chosen, tried = lab.choose(contender(near, far, dear), 2)
    assert (chosen.label, tried) == ("near", 3)
    assert lab.choose(contender(near, far, dear), 3)[0].label == "dear"


def test_a_setting_that_was_chosen_before_is_not_tried_again(lab: Lab) -> None:
    near, far = setting("near", 0.1, 2), setting("far", 0.2, 1)
    assert lab.choose(contender(near, far), 2, ("far", 9)) == (far, 9)
    assert not lab.qualities
    assert lab.choose(contender(near, far), 2, ("unknown", 9)) == (near, 2)


def test_where_no_setting_is_cheap_enough_it_says_so(lab: Lab) -> None:
    with pytest.raises(ValueError, match="a family: no setting of 2 computes 1 steps or fewer"):
        lab.choose(contender(setting("one", 0.1, 2), setting("two", 0.1, 3)), 1)


def test_what_is_in_files_isnt_drawn_again(lab: Lab, tmp_path: Path) -> None:
    class Fitted:
        size, task = SIZE, DIGITS

    bench = measure.Bench(SIZE, tmp_path, Fitted())  # type: ignore[arg-type]
    bench.__dict__["lab"] = lab
    family = contender(setting("near", 0.1, 2))
    bench.draw(family, 10)
    drawn = bench.drawn(family, 10)
    assert [one["setting"] for one in drawn] == ["near", "near"]
    assert torch.equal(drawn[0]["images"], IMAGES + 0.1)
    bench.draw(contender(setting("other", 0.2, 2)), 10)
    assert [one["setting"] for one in bench.drawn(family, 10)] == ["near", "near"]


def test_names_of_contenders_are_their_own() -> None:
    names = [contender.name for contender in roster.contenders()]
    assert len(set(names)) == len(names)


MEASURED = [task for task in TASKS.values() if (RESULTS / f"{task.results_of('peers_equal')}.json").exists()]


@pytest.mark.parametrize("task", MEASURED, ids=lambda task: task.name)
def test_the_committed_page_is_what_the_results_give(task: Task) -> None:
    results = page.load(RESULTS, task)
    assert (ROOT / page.page_of(task)).read_text() == page.text(results, task)


def test_a_lab_samples_its_tasks_model(tmp_path: Path) -> None:
    lab = Lab(SIZE, {10: [0, 2]}, tmp_path, GLYPHS)
    assert lab.batch.noise.shape == (2, 1, 32, 32)
    (labels,) = lab.work.conditions(lab.batch)
    assert labels.tolist() == [0, 1, GLYPHS.classes, GLYPHS.classes]
    (batch,) = lab.work.batches()
    assert lab.work.shipped()(*lab.work.inputs_of(batch)).shape == (4, 1, 32, 32)


def test_a_lead_whose_interval_reaches_zero_is_told_as_none() -> None:
    def line(lead: list[float]) -> dict[str, object]:
        return {"name": "peer", "kind": "sampler", "count": 10, "lead_db": {UNCACHED: lead, CONVERGED: [1.0, 0.1]}}

    assert "not of peer at 10 (+0.2 ± 0.3 dB)" in page.verdict([line([0.2, 0.3])])
    assert "in 1 of 1 comparisons." in page.verdict([line([0.5, 0.3])])
    assert "**+0.2 ± 0.3**" in page.leads([line([0.2, 0.3])], UNCACHED, [10])


def test_a_section_on_time_says_how_far_from_the_limit_each_is() -> None:
    point = {
        "family": "a peer", "speedup": 2.5, "speedup_by_round": [2.4, 2.6], "speedup_of_processor_time": 2.7,
        "macs": 0.34,
    }  # fmt: skip
    ours = point | {"family": "moeca output, fitted", "speedup_of_processor_time": 2.5}
    multistep = point | {"family": "calibrated multistep", "speedup_of_processor_time": 3.0}
    result = {
        "points": [point, ours, multistep], "size": {"rounds": 2, "digits": 8}, "load_1min": [1.0, 2.0],
        "machine": {"date": "2026-11-29", "commit": "abcdef0"},
        "cheap_steps": [{"samples": 8, "share": 0.0066}, {"samples": 16, "share": 0.0034}],
    }  # fmt: skip
    assert "| a peer | 2.50 (2.40 to 2.60) | 2.70 | 34.0% | 2.94 |" in page.latency(result)
    assert "0.66% of a full step with 8 digits, 0.34% of a full step with 16 digits at once" in page.latency(result)
    # 20.4 of its steps in our time for 17 and 33 cheap ones of 0.66 %; so one of ours takes as long as 1.18 of its
    full = 17 * 3.0 / 2.5 / (17 + 33 * 0.0066)
    assert steps_in_our_time(result, 17, 50) == pytest.approx(20.4)
    assert steps_in_our_time(result, 10, 50) == pytest.approx(full * (10 + 40 * 0.0066))


def test_a_section_on_equal_time_tells_the_leads() -> None:
    line = {
        "count": 17, "truth": "uncached", "steps_in_our_time": 18.42, "evaluations": 19, "psnr_db": [57.6, 0.4],
        "lead_db": [0.2, 0.3],
    }  # fmt: skip
    result = {"samples": 256, "lines": [line], "machine": {"date": "2026-11-29", "commit": "abcdef0"}}
    assert "| 17 | uncached | 18.4 | 19 | 57.6 ± 0.4 | **+0.2 ± 0.3** |" in page.equal_time(result)
