"""The workloads: what they say of their models is so, and every contender caches in each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import __main__ as peers
from benchmarks.peers import dbcache, exported, fora, macs, ours, refused, taylorseer, teacache
from benchmarks.peers.thirds import Thirds
from benchmarks.peers.way import Plain, Way
from benchmarks.peers.workload import Workload, relative_l2
from benchmarks.peers.workloads import WORKLOADS, workload

pytest.importorskip("diffusers", reason="diffusers isn't installed: pip install -e '.[bench]'")

RANDOM = ("s2", "hidream")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def small(name: str) -> Workload:
    return workload(name, quick=True)


@cache
def uncached(name: str) -> Tensor:
    with torch.no_grad():
        work = small(name)
        return work.draw(work.shipped(), work.batches()[0])


def error(name: str, way: Way) -> float:
    return relative_l2(way.sample(small(name).batches()[0]), uncached(name))


@pytest.mark.parametrize("name", WORKLOADS)
def test_modules_and_stacks_are_in_the_model(name: str) -> None:
    """They cover what the model computes but embeddings, modulation and the output."""
    work = small(name)
    model = work.shipped()
    assert work.names(model)
    assert all(name.startswith(tuple(work.stacks)) for name in work.names(model))
    assert 0 < macs.without_modules(work) < 0.05
    stacks = sum(macs.of_blocks(work, stack) for stack in work.stacks)
    assert 0.95 < stacks < 1
    assert macs.of_blocks(work, next(iter(work.stacks)), but=1) < macs.of_blocks(work, next(iter(work.stacks)))


@pytest.mark.parametrize("name", RANDOM)
def test_instances_are_equal_and_rounds_are_not(name: str) -> None:
    work = workload(name, quick=False)
    first, second = work.batches()[:2]
    assert not torch.equal(first.noise, second.noise)
    assert torch.equal(first.noise, work.batches()[0].noise)
    weights = [dict(small(name).shipped().named_parameters()) for _ in range(2)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_instances_of_s2_share_their_weights_and_nothing_else() -> None:
    plain, prepared = small("s2").shipped(), small("s2").prepared()
    shared = zip(plain.parameters(), prepared.parameters(), strict=True)
    assert all(one is other for one, other in shared)
    assert {id(one) for one in plain.modules()}.isdisjoint(id(one) for one in prepared.modules())
    x = small("s2").inputs_of(small("s2").batches()[0])
    torch.testing.assert_close(plain(*x), prepared(*x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s2", "hidream"])
def test_every_contender_is_exact_where_it_never_hits_and_caches_elsewhere(name: str) -> None:
    pytest.importorskip("cache_dit", reason="cache-dit isn't installed: pip install -e '.[bench]'")
    work = small(name)
    assert error(name, Plain(work.prepared(), work)) < 1e-4
    copies = fora.Fora(work, compiled=False)
    seer = taylorseer.TaylorSeer(work, order=1, compiled="no")
    steps = work.size.steps
    cached = dbcache.DBCache(work, 0, "no", Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2)
    never: list[Way] = [
        fora.Interval(copies, work, 1),
        taylorseer.Interval(seer, work, interval=1, warmup=steps),
        dbcache.Setting(cached, work, residual_diff_threshold=0.0),
    ]
    for way in never:
        assert error(name, way) < 1e-4
        assert way.macs() == pytest.approx(1)
    hitting: list[Way] = [
        fora.Interval(copies, work, 3),
        taylorseer.Interval(seer, work, interval=3),
        dbcache.Setting(cached, work, residual_diff_threshold=2.0),
    ]
    for way in hitting:
        assert error(name, way) > 1e-3
        assert 0.3 < way.macs() < 0.8
        assert way.state_bytes() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_teacache_is_the_model_where_it_always_computes_and_else_computes_about_every_second_step(name: str) -> None:
    work, thirds = small(name), Thirds(small(name), compiled=False)
    always = teacache.Setting(thirds, work, -1.0)
    assert error(name, always) < 1e-4
    assert 1 < always.macs() < 1.01
    half = teacache.Setting(thirds, work, teacache.threshold_for(work, 2))
    assert error(name, half) > 1e-3
    assert half.last is not None
    assert 3 <= half.last.computed <= 6 < work.size.steps


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_bundles_draw_what_torch_draws(name: str) -> None:
    full, cached = exported.uniform((3,)).open(small(name)).values()
    assert error(name, full) < 1e-4
    assert full.macs() == 1
    assert error(name, cached) > 1e-3
    assert 0.3 < cached.macs() < 0.8
    assert cached.state_bytes() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_moeca_keeps_what_it_tells(name: str) -> None:
    torch._dynamo.reset()
    work = small(name)
    way = ours.Moeca(work.prepared(), work, "uniform:3:warmup=2", inner="eager", order=1)
    told = way.told_bytes()
    assert error(name, way) > 1e-3
    assert 0 < told == way.held_bytes() <= way.state_bytes()


def test_what_the_hooks_of_diffusers_find_is_told() -> None:
    left = {name: refused.left_out(small(name)) for name in RANDOM}
    assert "IndexError" in left["hidream"]["FirstBlockCache (diffusers)"]
    assert "hooks 0 blocks" in left["hidream"]["MagCache (diffusers)"]
    assert "hooks 2 blocks" in left["s2"]["FirstBlockCache (diffusers)"]
    assert "hooks 2 blocks" in left["s2"]["MagCache (diffusers)"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_a_quick_run_of_speed_alone_writes_every_figure(name: str, tmp_path: Path) -> None:
    pytest.importorskip("cache_dit", reason="cache-dit isn't installed: pip install -e '.[bench]'")
    peers.main(["--model", name, "--quick", "--out", str(tmp_path)])
    written: dict[str, Any] = json.loads((tmp_path / f"{small(name).result}.json").read_text())
    points = written["heats"]["speed"]["points"]
    assert {point["side"] for point in points} == {"plain", "peer", "moeca"}
    assert all(point["finite"] for point in points)
    assert [point["family"].startswith("moeca") for point in points] == ["told_bytes" in point for point in points]
    assert "MagCache (diffusers)" in written["left_out"]
