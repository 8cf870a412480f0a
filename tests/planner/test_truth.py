"""A quantized model calibrated towards the model in full precision: regions, and samples that are given."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import OptionError, ScheduleError
from moeca_compile.frontend.prompts import takes
from moeca_compile.planner.price import price_of
from moeca_compile.planner.request import Request
from moeca_compile.planner.search.floor import Floor
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import Plan
from moeca_compile.planner.store import Store
from moeca_compile.planner.truth import Target, given_samples, read_truth, sample_other
from tests.frontend.test_quantized import quantize
from tests.sampling import dit

TIMES = (900.0, 800.0, 700.0, 600.0)
SEEDS, HOLDOUT = (0, 1), (1000,)


def sample(model: Any, seed: int) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for t in TIMES:
        x = x - 0.1 * model(x, torch.full((2,), t), torch.tensor([1, 2])).detach()
    return x


def test_a_loop_that_tells_no_signature_takes_nothing() -> None:
    loop: Any = max
    assert not takes(loop, "steps")
    with pytest.raises(OptionError, match="give it a keyword steps"):
        read_truth("converged", loop, (0,), "calibrate", OptionError, lambda model, seed: None)
    request = Request.read("macs:0.5", "auto", 2, 2, 0, None, None, 2**30, None, 0, 0.0)
    assert price_of([request], "output", "converged", loop).total > 0


def pair(bits: str = "int8") -> tuple[nn.Module, nn.Module]:
    """A model in full precision, and the same one with quantized weights."""
    full_precision = dit(style="dense")
    quantized = copy.deepcopy(full_precision)
    quantize(quantized, bits)
    return full_precision, quantized


def calibrated(model: Any, truth: Any, **options: Any) -> moeca.Schedule:
    torch._dynamo.reset()
    options = {
        "budget": "macs:0.6", "seeds": SEEDS, "holdout": HOLDOUT, "order": 1, "max_variants": 2,
        "granularity": "region", **options,
    }  # fmt: skip
    return moeca.calibrate(model, options.pop("sample", sample), inner="eager", progress=False, truth=truth, **options)


def psnr_to(wanted: Tensor, found: Tensor, data_range: float) -> float:
    errors = (found - wanted).square().flatten(1).mean(1).tolist()
    return mean_psnr([errors], data_range)


@pytest.mark.slow
def test_regions_of_an_int8_model_with_the_full_precision_one_as_truth(tmp_path: Path) -> None:
    full_precision, quantized = pair()
    schedule = calibrated(quantized, full_precision, resume=tmp_path)
    predicted = schedule.predicted
    assert "nearest to given samples" in schedule.made_by
    # what is told is what a user measures
    cached = moeca.compile(quantized, schedule=schedule, inner="eager")
    with torch.no_grad():
        truth, uncached = ([sample(one, seed) for seed in (*SEEDS, *HOLDOUT)] for one in (full_precision, quantized))
        found = sample(cached, HOLDOUT[0])
    data_range = float(torch.cat(uncached).max() - torch.cat(uncached).min())
    told = [
        (predicted["psnr_db_given_holdout"], psnr_to(truth[-1], found, data_range)),
        (predicted["uncached_psnr_db_given_holdout"], psnr_to(truth[-1], uncached[-1], data_range)),
        (predicted["psnr_db_holdout"], psnr_to(uncached[-1], found, data_range)),
        (predicted["uncached_psnr_db_given"], psnr_to(torch.cat(truth[:2]), torch.cat(uncached[:2]), data_range)),
    ]
    for figure, measured in told:
        assert figure == pytest.approx(measured, abs=0.05)
    compared = moeca.compare(cached, sample, seeds=HOLDOUT, truth=full_precision, data_range=data_range, progress=False)
    assert compared.mean("psnr_db", "given") == pytest.approx(told[0][1], abs=0.05)
    assert compared.mean("psnr_db", "given", "plain") == pytest.approx(told[1][1], abs=0.05)
    # the folder goes on, and belongs to these samples
    again = calibrated(quantized, dict(zip((*SEEDS, *HOLDOUT), truth, strict=True)), resume=tmp_path)
    assert again.rows == schedule.rows
    assert again.predicted["psnr_db"] == predicted["psnr_db"]
    for other, says in (
        (lambda seed: 2 * sample(full_precision, seed), "was compared with other samples that truth gave for seed 0"),
        ("uncached", "truth is 'given' there, None here"),
    ):
        with pytest.raises(ScheduleError, match=says):
            calibrated(quantized, other, resume=tmp_path)
    with pytest.raises(ScheduleError, match=r"computed at every step, the samples are \d+\.\d dB from those that tru"):
        calibrated(quantized, full_precision, budget="psnr:100", holdout=0)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["region", "stack"])
def test_the_search_finds_the_schedule_that_the_truth_was_drawn_with(granularity: str) -> None:
    """No plan is nearer to samples of `made` than `made`: rollouts are compared with them, not with the uncached."""
    full = dit(style="dense", depth=2)
    every = {"granularity": granularity, "order": "auto", "budget": "macs:0.6", "holdout": 0}
    near_uncached = calibrated(full, "uncached", **every)
    made = moeca.Schedule.uniform(2, order=0)
    torch._dynamo.reset()
    with torch.no_grad():
        handle = moeca.compile(copy.deepcopy(full), schedule=made, granularity=granularity, inner="eager")
        truth = {seed: sample(handle, seed) for seed in SEEDS}
    found = calibrated(full, truth, **every)
    assert found.rows[1] != near_uncached.rows[1]
    assert [found.rows[step] for step in range(4)] == [found.rows[0], found.rows[1]] * 2
    assert found.predicted["psnr_db_given"] > 100 > found.predicted["uncached_psnr_db_given"]


@pytest.mark.slow
def test_schedules_that_compute_branches_come_near_to_a_truth_too() -> None:
    full_precision = dit()
    moeca.prepare(full_precision)
    nearby = copy.deepcopy(full_precision)
    for weight in nearby.parameters():
        weight.data.mul_(1.001)
    predicted = calibrated(full_precision, nearby, branches=0.2, holdout=0).predicted
    assert any(name.startswith("tried branches") for name in predicted)
    assert max(value for name, value in predicted.items() if name.startswith("tried")) == predicted["psnr_db_given"]


@pytest.mark.slow
def test_two_models_of_one_loop_have_two_as_truth() -> None:
    from tests.frontend.test_two_transformers import models
    from tests.planner.test_two_transformers import drawn

    predicted = calibrated(models(), models(0.01), sample=drawn, holdout=0).predicted
    assert predicted["psnr_db_given"] == max(predicted["tried hand_over"], predicted["tried cold start"])
    assert predicted["psnr_db"] > predicted["psnr_db_given"]


class Pipe:
    """Draws with whatever transformer is set on it."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    def draw(self, model: object, seed: int) -> Tensor:
        del model
        with torch.no_grad():
            drawn: Tensor = self.transformer(torch.full((1, 2), float(seed)))
        return drawn


def test_another_model_is_set_on_the_pipeline_while_it_samples() -> None:
    ones, twos = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    nn.init.constant_(ones.weight, 1.0)
    nn.init.constant_(twos.weight, 2.0)
    pipe = Pipe(ones)
    for truth in (twos, Pipe(twos), [twos]):
        goal = read_truth(
            truth, pipe.draw, (3,), "calibrate", ScheduleError,
            lambda other, seed: sample_other(other, pipe, pipe.draw, seed, "calibrate"),
        )  # fmt: skip
        assert not isinstance(goal, str)
        samples = given_samples(goal, 3, torch.zeros(1, 2), "calibrate", ScheduleError)
        assert samples.tolist() == [[12.0, 12.0]]
        assert pipe.transformer is ones


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (torch.zeros(2, 4, 8, 9), r"for seed 5 have shape \[2, 4, 8, 9\], the sampler's \[2, 4, 8, 8\]"),
        (torch.zeros(1, 4, 8, 8), r"for seed 5 have shape \[1, 4, 8, 8\], the sampler's \[2, 4, 8, 8\]"),
        (torch.full((2, 4, 8, 8), torch.nan), "for seed 5 aren't all finite"),
        (None, "truth gives a NoneType for seed 5, expected a tensor"),
        (["a fox"], "truth gives a list for seed 5, expected a tensor"),
    ],
)
@pytest.mark.parametrize("error", [ScheduleError, OptionError])
def test_given_samples_are_like_the_uncached_ones(samples: Any, says: str, error: type[Any]) -> None:
    for goal in ({5: samples}, lambda seed: samples):
        with pytest.raises(error, match=says):
            given_samples(goal, 5, torch.zeros(2, 4, 8, 8), "calibrate", error)


@pytest.mark.parametrize("granularity", ["region", "output"])
@pytest.mark.parametrize(
    ("truth", "says"),
    [
        ({0: torch.zeros(1), 1: torch.zeros(1)}, "truth has no samples for seed 1000; give them for every seed"),
        ([torch.zeros(1)], r"truth=\[tensor.*expected one of uncached, converged, the samples of each seed"),
        (3, "truth=3, expected one of uncached"),
        (dict.fromkeys((0, 1, 1000), torch.tensor([torch.nan])), "truth gives for seed 0 aren't all finite"),
        (dict.fromkeys((0, 1, 1000), "a fox"), "truth gives a str for seed 0, expected a tensor"),
    ],
)
def test_a_truth_is_refused_before_anything_is_sampled(truth: Any, says: str, granularity: str) -> None:
    def never(model: Any, seed: int) -> Tensor:
        raise AssertionError

    with pytest.raises(ScheduleError, match=says):
        calibrated(nn.Linear(1, 1), truth, sample=never, granularity=granularity)


def test_a_folder_keeps_the_given_samples_and_refuses_others(tmp_path: Path) -> None:
    asked: list[int] = []

    def truth(seed: int) -> Tensor:
        asked.append(seed)
        return torch.full((2, 3), float(seed))

    uncached = torch.zeros(2, 3)
    for _ in range(2):
        target = Target(truth, Store(tmp_path))
        assert [float(target.of(seed, uncached)[0, 0]) for seed in (1, 2, 2)] == [1.0, 2.0, 2.0]
    assert asked == [1, 2, 1], "of a folder, those of the first seed are drawn again"
    changed = {1: torch.full((2, 3), 1.0), 2: torch.full((2, 3), 2.5)}
    target = Target(changed, Store(tmp_path))
    target.of(1, uncached)
    with pytest.raises(ScheduleError, match="other samples that truth gave for seed 2"):
        target.of(2, uncached)
    assert Target("uncached", Store(tmp_path)).of(1, uncached) is uncached


def test_folders_of_different_given_samples_do_not_merge(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        store = Store(tmp_path / name / "region")
        store.check({"truth": "given"})
        store.add_truth(0, torch.zeros(1, 2), 1.0)
        Target({0: torch.full((1, 2), value)}, store).of(0, torch.zeros(1, 2))
        store.add_rollout(Plan("CF", "order-1"), 0, [0.5], 1.0, [0.25])
    moeca.merge_shards(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    merged = Store(tmp_path / "all" / "region")
    assert merged.rollouts == {(Plan("CF", "order-1"), 0): ((0.5,), 1.0)}
    assert merged.to_uncached == {(Plan("CF", "order-1"), 0): (0.25,)}
    with pytest.raises(ScheduleError, match=r"compared with other samples that truth gave for seed 0 than the others"):
        moeca.merge_shards(tmp_path / "all", [tmp_path / "c"])


def test_estimates_know_the_error_that_no_cache_causes() -> None:
    """Of plans with estimates of 30, 20 and 10 dB, the middle one reached 40 dB to the uncached samples."""
    estimates = {Plan("CF", "order-0"): 20.0, Plan("CF", "order-1"): 30.0, Plan("CC"): 99.0}
    known = [Plan("CC"), Plan("CF", "order-0")]
    floor = Floor(40.0, lambda plan: {known[1]: 40.0}[plan])
    expected = [floor.expected(estimate, known, estimates.__getitem__) for estimate in (30.0, 20.0, 10.0)]
    assert expected == pytest.approx([39.586, 36.990, 29.586], abs=1e-3)
    assert floor.expected(30.0, known[:1], estimates.__getitem__) == 30.0
    assert floor.expected(float("-inf"), known, estimates.__getitem__) == float("-inf")
