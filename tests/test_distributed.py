"""Data parallel: two ranks draw what one process draws; ranks that differ or end are told, and the job goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

import moeca_compile as moeca
from benchmarks.scale_model import exchanged_bytes
from moeca_compile import distributed as parallel
from moeca_compile.errors import LoweringError, OptionError, ScheduleError, StateError
from moeca_compile.runtime.pace import Pace
from moeca_compile.schedule import Schedule
from tests import ranks
from tests.exchanged import ExchangedDiT
from tests.passes.test_find_inputs import Model
from tests.tools import analyze_module


def expected() -> dict[str, list[float]]:
    network = ranks.compiled()
    return {str(seed): ranks.draw(network, seed).flatten().tolist() for seed in ranks.SEEDS}


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    results = ranks.run("differing", tmp_path)
    assert [status for status, _ in results] == [0, 0]
    for _, result in results:
        assert "the ranks differ in schedule (" in result["schedule"]
        assert " on rank 0; " in result["schedule"]
        assert "the ranks differ in weights (" in result["weights"]
        assert "the ranks differ in resolution (" in result["further"]
        assert result["samples"] == expected()


@pytest.mark.slow
def test_a_killed_rank_is_told_and_the_job_goes_on(tmp_path: Path) -> None:
    (status, result), (killed, nothing) = ranks.run("killed", tmp_path)
    assert (status, killed, nothing) == (0, 9, None)
    assert "rank 0 lost another rank while samples were drawn. Those that are done are in" in result["error"]
    done = {int(path.stem) for path in (tmp_path / "samples").glob("*.npy")}
    assert done == {0, 1, 2, 4}
    results = ranks.run("again", tmp_path)
    assert [seed for _, result in results for seed in result["drawn"]] == [3]
    assert all(result["samples"] == expected() for _, result in results)


@pytest.mark.slow
def test_a_failing_rank_is_named(tmp_path: Path) -> None:
    (_, first), (_, second) = ranks.run("failing", tmp_path)
    assert second["error"] == "ValueError: no seed 3"
    assert first["error"].startswith("StateError: the job failed on rank 1: ValueError: no seed 3. Mend that")


@pytest.mark.slow
def test_a_calibration_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    alone = moeca.calibrate(ranks.model(), ranks.plain_draw, **ranks.CALIBRATION)
    truth = {seed: ranks.plain_draw(ranks.compiled(), seed) for seed in (0, 1, 2, 1000, 1001)}
    aimed = moeca.calibrate(ranks.model(), ranks.plain_draw, truth=truth, **ranks.CALIBRATION)
    assert aimed.predicted.keys() >= {"psnr_db_given", "uncached_psnr_db_given_holdout"}
    for status, result in ranks.run("calibrated", tmp_path):
        assert status == 0
        for name, expected_schedule in (("schedule", alone), ("to samples", aimed)):
            schedule = Schedule.from_json(result[name])
            assert schedule.rows == expected_schedule.rows
            for figure, value in expected_schedule.predicted.items():
                assert not figure.startswith("psnr_db") or schedule.predicted[figure] == value, (name, figure)


@pytest.mark.slow
def test_models_that_are_spread_over_ranks(tmp_path: Path) -> None:
    """Regions: uncached and said so. Output: the steps between exchange what the ranks agree by, and the rest is the
    whole model's."""
    for status, results in ranks.run("spread", tmp_path):
        assert status == 0
        for name, says in (("cut", "its parameters are spread over several ranks"), ("sharded", "graph break")):
            assert results[name]["uncached"] == results[name]["plain"], name
            assert says in results[name]["warnings"][0]
            assert min(results[name]["exchanges"]) > 0
            assert results[name]["cached_exchanges"][1::2] == [1, 1, 1], name  # by which the ranks agree on the step
            both = [exchanges + 1 for exchanges in results[name]["exchanges"][2::2]]
            assert results[name]["cached_exchanges"][2::2] == both, name
            assert torch.allclose(
                torch.tensor(results[name]["cached"]), torch.tensor(results[name]["whole"]), atol=1e-5
            ), name
            assert results[name]["cached"][0] == results[name]["plain"][0]


@pytest.mark.slow
def test_experts_that_are_spread_over_ranks(tmp_path: Path) -> None:
    """Functional collectives are captured; those of skipped regions are gone, and the rest sends what the cost model
    says."""
    for status, result in ranks.run("exchanging", tmp_path):
        assert status == 0
        assert all(result["full"]["equal"])
        assert result["uniform:3"]["equal"] == [True, False, False] * 2
        assert result["v1"] == {"collectives": 0, "bytes": 0}
        assert result["v0"]["collectives"] == 4
        layer = exchanged_bytes(rows=4 * 32, hidden=16, ranks=2, width=4)
        assert result["v0"]["bytes"] / 2 == 2 * layer  # of two ranks' parts one stays


@pytest.mark.slow
def test_ranks_agree_on_an_adaptive_schedule(tmp_path: Path) -> None:
    """Each rank's own figure would choose other steps, and one rank alone would drop its state: both would hang."""
    (status, slow), (other, fast) = ranks.run("adapting", tmp_path)
    assert (status, other) == (0, 0)
    assert slow["variants"] == fast["variants"]
    assert set(slow["variants"]) == {"v0", "v1"}
    pairs = [(own, others) for (own, _), (others, _) in zip(slow["pairs"], fast["pairs"], strict=True)]
    assert any(others > 2 * own for own, others in pairs if own is not None)
    steps = len(slow["variants"])
    assert chosen([agreed for _, agreed in slow["pairs"][:steps]]) == slow["variants"]
    alone = [chosen([own for own, _ in result["pairs"][:steps]]) for result in (slow, fast)]
    assert alone[0] != alone[1]  # up to the first difference, these are the figures that each would have measured
    assert [agreed for _, agreed in slow["pairs"]] == [agreed for _, agreed in fast["pairs"]]
    assert slow["after"] == fast["after"]
    assert ["v0", True] in slow["after"][1:]


@pytest.mark.slow
def test_weights_of_one_rank_alone(tmp_path: Path) -> None:
    """The rank whose state is dropped would compute a step that the other takes from the cache: both would hang."""
    steps = {
        "regions": [["v0", False], ["v1", False], ["v1", False], ["v0", False], ["v0", True], ["v1", False]],
        "cut": [["v0", False], ["v1", False], ["v1", False], ["v0", False], ["v0", True], ["v1", False]],
        "adaptive": [["v0", False], ["v0", False], ["v1", False], ["v1", False], ["v0", True], ["v1", False]],
    }
    for rank, (status, results) in enumerate(ranks.run("changing", tmp_path)):
        assert status == 0
        for name, expected_steps in steps.items():
            assert results[name]["steps"] == expected_steps, (rank, name)
            assert results[name]["difference"] < 1e-6
            assert len(results[name]["warnings"]) == 1 - rank
            assert all(
                "rank 1 has no state for step 4: all ranks compute" in says for says in results[name]["warnings"]
            )


def chosen(drifts: list[float | None]) -> list[str]:
    """The variants of `ranks.adapting`, if a rank decides by these figures."""
    pace, adaptive, variants = Pace(), Schedule.parse(ranks.ADAPTIVE).adaptive, list[str]()
    assert adaptive is not None
    for step, drift in enumerate(drifts):
        row = pace.choose(adaptive, step, drift)
        pace.ran(row == 0)
        variants.append(f"v{row}")
    return variants


@pytest.mark.slow
def test_ranks_with_different_rows_compute_all_of_them(tmp_path: Path) -> None:
    (status, first), (other, second) = ranks.run("disagreeing", tmp_path)
    assert (status, other) == (0, 0)
    assert first["digest"] == second["digest"]
    assert first["warnings"] == second["warnings"]
    assert ["the ranks would run different rows at step " in says for says in first["warnings"]] == [True]


@pytest.mark.slow
def test_a_hang_is_noticed(tmp_path: Path) -> None:
    """Ranks that are made to disagree: one waits for an exchange that the other never makes."""
    (first, result), (second, told) = ranks.run("silent", tmp_path)
    assert (first, second) == (0, 7)
    assert result["computed"] > 0
    assert told["hang"].startswith("schedule 2, step ")


# -- one rank, whose peers are made up ---------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def with_peer(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A second rank that answers with what this one says, changed."""

    def gather(values: list[Any], value: dict[str, Any]) -> None:
        values[:] = [value, change(value)]

    monkeypatch.setattr(distributed, "all_gather_object", gather)


def test_without_a_group() -> None:
    with pytest.raises(StateError, match="isn't initialized: start with torchrun"):
        parallel.check_ranks(ranks.model())
    with pytest.raises(StateError, match="isn't initialized: start with torchrun"):
        parallel.share(range(3))


def test_other_versions(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with_peer(monkeypatch, lambda facts: {**facts, "torch": "2.0.0"})
    with pytest.raises(StateError, match=r"the ranks differ in torch \(.* on rank 0; 2\.0\.0 on rank 1\)"):
        parallel.check_ranks(ranks.model())


def test_a_lost_rank(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(values: list[Any], value: dict[str, Any]) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed, "all_gather_object", lost)
    with pytest.raises(StateError, match=r"lost another rank while the ranks were compared.*Connection closed by peer"):
        parallel.check_ranks(ranks.model())


def test_a_folder_of_another_job(group: None, tmp_path: Path) -> None:
    drawn = parallel.sample(ranks.model(), ranks.draw, [3, 1], tmp_path)
    assert list(drawn) == [3, 1]
    assert torch.equal(drawn[1], ranks.draw(ranks.model(), 1))
    with pytest.raises(StateError, match="holds samples made with other weights: give another folder"):
        parallel.sample(ranks.model(seed=1), ranks.draw, [3], tmp_path)
    with pytest.raises(OptionError, match="a seed is given twice"):
        parallel.sample(ranks.model(), ranks.draw, [3, 3], tmp_path)


def test_a_folder_that_one_rank_alone_sees(group: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with_peer(monkeypatch, lambda facts: facts)
    with pytest.raises(StateError, match=r"lacks seeds \[1\]: give a folder that all ranks see"):
        parallel.sample(ranks.model(), ranks.draw, [0, 1, 2], tmp_path)


def test_a_calibration_that_cannot_be_shared(group: None) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"prompts": ["a fox"]}, "prompts can't be given"),
        ({}, "name the granularity"),
        ({"granularity": "output", "truth": "converged"}, "no truth='converged'"),
    )
    for arguments, says in cases:
        with pytest.raises(OptionError, match=says):
            parallel.calibrate(ranks.model(), no_draw, budget="macs:0.5", **arguments)


@pytest.mark.parametrize(
    ("truth", "says"),
    [
        ({0: torch.zeros(1)}, "truth has no samples for seed 1"),
        (dict.fromkeys((0, 1), torch.tensor([torch.nan])), "seed 0 aren't all finite"),
    ],
)
def test_a_truth_that_all_ranks_refuse(group: None, truth: Any, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        parallel.calibrate(
            ranks.model(), no_draw, budget="macs:0.5", granularity="region", seeds=2, holdout=0, truth=truth
        )


def test_arguments_are_compared_by_what_they_hold(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function has another address on each rank; samples print alike where they differ."""
    samples = {0: torch.zeros(2000)}
    assert parallel._text({"quality": no_draw}) == "{'quality': 'no_draw'}"
    assert parallel._text(samples) == parallel._text({0: torch.zeros(2000).numpy()})
    other = {0: torch.zeros(2000)}
    other[0][1000] = 1.0
    assert str(samples) == str(other)
    assert parallel._text(samples) != parallel._text(other)


def no_draw(model: Any, seed: int) -> Tensor:
    raise AssertionError("nothing is sampled")


@pytest.fixture
def fake_peer() -> Iterator[None]:
    """A group of two ranks of which the other isn't there; for graphs that are captured and don't run."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


class Gathering(Model):
    """Each rank has a part of the prompt."""

    def forward(self, prompt: Tensor, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        whole: Any = collectives.all_gather_single(prompt, 1, distributed.group.WORLD)
        return super().forward(whole, x, t, y)


def test_what_ranks_exchange_is_not_hoisted(fake_peer: None) -> None:
    """A rank whose prompt changes alone would compute its prologue alone, and wait."""
    inputs = (torch.randn(2, 7, 6), torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([1, 2]))
    levels = [value.level for value in analyze_module(Gathering(), *inputs).facts.hoisted]
    assert sorted(levels) == ["invariant", "step"]  # rotary angles and the conditioning; neither keys nor values


def test_requests_of_a_spread_model_share_no_calls(fake_peer: None) -> None:
    """The ranks would choose different calls. Nothing ran when it is refused, so no rank waits."""
    handle = moeca.compile(ExchangedDiT(ranks=2, depth=1).eval(), schedule="uniform:3", inner="eager")
    with pytest.raises(StateError, match=r"exchanges tensors with other ranks.*one trajectory for each request"):
        moeca.BatchedModel(handle, (torch.randn(2, 16, 4), torch.tensor([900.0, 100.0])), 2**20, 2)


def test_a_spread_model_is_not_exported(fake_peer: None, tmp_path: Path) -> None:
    inputs = (torch.randn(1, 16, 4), torch.tensor([900.0]))
    with pytest.raises(LoweringError, match="what is exported runs by itself: export the whole model"):
        moeca.export(ExchangedDiT(ranks=2, depth=1).eval(), inputs, "full", tmp_path / "bundle", dynamic_batch=False)
