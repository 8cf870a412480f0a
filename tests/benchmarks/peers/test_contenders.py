"""Each contender caches what it says: exact where it never hits; the modules that run are those that are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from benchmarks.fitted import CONVERGED, FITTED_REGIONS, KEPT, UNCACHED
from benchmarks.peers import dbcache, fora, macs, ours, tables, taylorseer, teacache
from benchmarks.peers.thirds import Thirds
from benchmarks.peers.verdict import group_of
from benchmarks.peers.way import Way, bytes_in
from benchmarks.peers.workload import Batch, Size
from benchmarks.peers.workloads.trained_digits import QUICK, TrainedDigits
from moeca_compile.schedule import Schedule
from tests.benchmarks.peers.conftest import BATCH, WORK, psnr

NEEDS_DIFFUSERS = "diffusers isn't installed: pip install -e '.[bench]'"
NEEDS_CACHE_DIT = "cache-dit isn't installed: pip install -e '.[bench]'"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def calls_of(model: Any, way: Way) -> Counter[str]:
    """How often each block's attention and MoE ran in a trajectory; the routers and projections are what is hooked."""
    seen: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda module, args: seen.update([name])

    handles = [
        module.register_forward_pre_hook(count(name.removesuffix(end)))
        for name, module in model.named_modules()
        for end in (".qkv", ".shared_experts")
        if name.endswith(end)
    ]
    way.sample(BATCH)
    for handle in handles:
        handle.remove()
    return seen


def counted(calls: Counter[str]) -> float:
    """The share of the MACs that these calls and everything outside attention and MoE make."""
    parts = {name.replace(".inner", ""): number for name, number in calls.items()}
    ran = sum(number * macs.shares(WORK)[name] for name, number in parts.items())
    return ran / QUICK.steps + macs.without_modules(WORK)


@pytest.mark.slow
def test_shares_of_the_parts_are_those_that_moeca_counts() -> None:
    """By two counters: torch's on the model as shipped, moeca's on its graph."""
    found = moeca.explain(WORK.shipped(), *WORK.inputs_of(BATCH))
    assert {region.key: region.macs / found.total_macs for region in found.regions} == pytest.approx(
        {key: share for key, share in macs.shares(WORK).items() if key.endswith((".attn", ".moe"))}, rel=1e-6
    )


@pytest.mark.slow
def test_moecas_own_ways_say_what_they_spend(uncached: Tensor) -> None:
    uniform = ours.Moeca(WORK.prepared(), WORK, "uniform:2", inner="eager", order=1)
    assert 15 < psnr(uniform, uncached) < 80
    assert uniform.macs() == pytest.approx(0.5 + 0.5 * macs.without_modules(WORK), rel=1e-6)
    assert uniform.state_bytes() > 2 * 12 * 4 * 64 * 96 * 4  # every region's value and difference, both halves


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "computed"), [(UNCACHED, 0.2), (CONVERGED, 0.2), (FITTED_REGIONS, 0.205)])
def test_fitted_schedules_of_moeca_keep_what_they_told(kind: str, computed: float) -> None:
    work = TrainedDigits(Size(digits=1, rounds=1, steps=50))
    family = ours.fitted(kind, (20,))
    (way,) = family.open(work).values()
    told, images = way.told_bytes(), way.sample(work.batches()[0])
    assert images.isfinite().all()
    assert told == way.held_bytes() > 0
    assert way.macs() == pytest.approx(computed, abs=1e-3)


@pytest.mark.slow
def test_fora_copies_between_its_steps(uncached: Tensor) -> None:
    cache = fora.Fora(WORK, compiled=False)
    assert psnr(fora.Interval(cache, WORK, 1), uncached) > 120
    way = fora.Interval(cache, WORK, 3)
    assert counted(calls_of(cache.model, way)) == pytest.approx(way.macs(), rel=1e-6)
    assert 15 < psnr(way, uncached) < 60
    assert way.state_bytes() == 12 * 4 * 64 * 96 * 4
    way.forget()
    assert way.state_bytes() == 0


@pytest.mark.slow
def test_taylorseer_runs_the_steps_that_are_counted(uncached: Tensor) -> None:
    pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    seer = taylorseer.TaylorSeer(WORK, order=1, compiled="no")
    assert psnr(taylorseer.Interval(seer, WORK, 1, warmup=QUICK.steps), uncached) > 120
    way = taylorseer.Interval(seer, WORK, 3)
    assert counted(calls_of(seer.module, way)) == pytest.approx(way.macs(), rel=1e-6)
    assert 15 < psnr(way, uncached) < 60
    assert way.state_bytes() == 2 * 12 * 4 * 64 * 96 * 4
    torch.testing.assert_close(way.sample(BATCH), way.sample(BATCH), rtol=0, atol=0)


def test_taylorseers_cool_down_computes_the_last_steps() -> None:
    pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    seer = taylorseer.TaylorSeer(WORK, order=1, compiled="no")
    way = taylorseer.Interval(seer, WORK, interval=5, warmup=2, cooldown=QUICK.steps - 2)
    assert [step for step in range(QUICK.steps) if way.computes(step)] == [0, 1, 3, 6, 7]
    assert counted(calls_of(seer.module, way)) == pytest.approx(way.macs(), rel=1e-6)


@pytest.mark.slow
def test_taylorseers_lite_mode_forecasts_the_last_layer_alone(uncached: Tensor) -> None:
    pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    seer = taylorseer.TaylorSeer(WORK, order=1, compiled="no", lite=True)
    assert psnr(taylorseer.Interval(seer, WORK, 1, warmup=QUICK.steps), uncached) > 120
    way = taylorseer.Interval(seer, WORK, 3)
    assert 15 < psnr(way, uncached) < 60
    assert way.state_bytes() < 12 * 4 * 64 * 96 * 4  # less than a copy of every module's output


@pytest.mark.parametrize("calibrator", ["dmd", pytest.param("foca", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_calibrated_mask_computes_its_steps_and_forecasts_between(calibrator: str) -> None:
    pytest.importorskip("cache_dit", reason=NEEDS_CACHE_DIT)
    images = []
    for name in ("", calibrator):
        cache = dbcache.DBCache(
            WORK, 0, "no", name, Fn_compute_blocks=1, Bn_compute_blocks=0,
            steps_computation_mask=[1, 1, 1, 0, 1, 0, 0, 1], steps_computation_policy="static",
        )  # fmt: skip
        way = dbcache.Setting(cache, WORK)
        images.append(way.sample(BATCH))
        assert way.computed() == 5
    assert not torch.equal(*images)


@pytest.mark.slow
def test_dbcache_hits_where_its_threshold_says(uncached: Tensor) -> None:
    pytest.importorskip("cache_dit", reason=NEEDS_CACHE_DIT)
    cache = dbcache.DBCache(WORK, 0, "no", Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2)
    never = dbcache.Setting(cache, WORK, residual_diff_threshold=0.0)
    assert psnr(never, uncached) > 120
    assert never.macs() == 1
    way = dbcache.Setting(cache, WORK, residual_diff_threshold=0.6)
    calls = calls_of(cache.module, way)
    assert calls["blocks.0.attn"] == QUICK.steps
    # adaLN's projections of the blocks that didn't run are what the two counts differ by
    assert counted(calls) == pytest.approx(way.macs(), abs=6 * macs.shares(WORK)["blocks.0.adaLN_modulation"])
    assert way.macs() < 0.9
    torch.testing.assert_close(way.sample(BATCH), way.sample(BATCH), rtol=0, atol=0)
    assert way.state_bytes() > 4 * 64 * 96 * 4


@pytest.mark.slow
def test_masks_compute_the_steps_that_are_set() -> None:
    pytest.importorskip("cache_dit", reason=NEEDS_CACHE_DIT)
    ways = dbcache.masks().open(TrainedDigits(Size(2, 1, 28)))
    assert list(ways) == list(dbcache.POLICIES)
    fast = ways["fast"]
    fast.sample(BATCH)
    assert fast.macs() == pytest.approx(
        (11 + 17 * (1 - macs.of_blocks(WORK, "blocks", but=1))) / 28
    )  # its table says 11 of 28


@pytest.mark.slow
def test_teacache_is_exact_at_threshold_zero(uncached: Tensor) -> None:
    thirds = Thirds(WORK, compiled=False)
    always = teacache.Setting(thirds, WORK, -1.0)
    assert psnr(always, uncached) > 100
    assert always.macs() == pytest.approx(1, abs=1e-3)
    way = teacache.Setting(thirds, WORK, 0.3)
    calls = calls_of(thirds.model, way)
    assert way.last is not None
    assert set(calls.values()) == {way.last.computed}
    assert 2 <= way.last.computed < QUICK.steps
    assert way.macs() < 0.9


def test_a_random_schedule_computes_as_many_steps_as_asked() -> None:
    drawn = [ours.random_schedule(50, 13, seed) for seed in range(3)]
    for schedule in drawn:
        computed = [row for row in schedule.rows if row[0] is ours.C]
        assert len(computed) == 13
        assert schedule.rows[0] in computed
    assert drawn[0].rows != drawn[1].rows


@pytest.mark.parametrize("kind", [FITTED_REGIONS, UNCACHED, CONVERGED])
def test_fitted_schedules_are_committed_and_told_in_the_readme(kind: str) -> None:
    family = ours.fitted(kind)
    assert group_of(family.name) in tables.TOLD
    shares = map(int, ours.BUDGETS) if kind == FITTED_REGIONS else ours.OUTPUT_SHARES
    for share in shares:
        schedule = Schedule.load(KEPT / f"digits_{kind}_{share}.json")
        assert schedule.granularity == ("region" if kind == FITTED_REGIONS else "output")
        assert schedule.predicted["mac_fraction"] <= (share + 1) / 100


def test_one_span_computes_the_same_steps() -> None:
    whole = ours.load("20")
    span = ours.as_one_span(whole)
    assert [row[0] for row in span.rows] == [row[0] for row in whole.rows]
    assert (len(span.regions), span.order, span.timesteps) == (1, whole.order, whole.timesteps)


def test_bytes_are_counted_once() -> None:
    tensor = torch.zeros(10)
    assert bytes_in({"a": [tensor, tensor.view(2, 5)], "b": Batch(tensor, torch.zeros(3))}) == 40 + 12
