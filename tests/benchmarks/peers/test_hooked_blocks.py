"""The block caches of diffusers on a registered model: exact where they never hit, and their steps are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers isn't installed: pip install -e '.[bench]'")

from benchmarks.peers import hooked_blocks
from benchmarks.peers.hooked_blocks import HookedBlocks, Setting
from benchmarks.peers.workloads.trained_digits import QUICK
from tests.benchmarks.peers.conftest import BATCH, WORK, psnr


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def mag_cache() -> HookedBlocks:
    return hooked_blocks.mag_cache(WORK, BATCH)


@pytest.mark.parametrize(
    ("open_cache", "hitting"),
    [
        (lambda: hooked_blocks.first_block_cache(WORK), {"threshold": 0.5}),
        (mag_cache, {"threshold": 0.5, "max_skip_steps": 2}),
        (lambda: hooked_blocks.sea_cache(WORK), {"threshold": 0.5}),
    ],
    ids=["FirstBlockCache", "MagCache", "SeaCache"],
)
@pytest.mark.slow
def test_it_never_hits_at_threshold_zero_and_hits_above(
    open_cache: Callable[[], HookedBlocks], hitting: dict[str, float], uncached: Tensor
) -> None:
    cached = open_cache()
    never = Setting(cached, threshold=0.0)
    assert psnr(never, uncached) > 120
    assert never.computed() == QUICK.steps
    assert never.macs() == pytest.approx(1)
    way = Setting(cached, **hitting)
    assert 10 < psnr(way, uncached) < 80
    assert 2 <= way.computed() < QUICK.steps
    assert way.macs() < 0.95
    assert way.state_bytes() > 0
    torch.testing.assert_close(way.sample(BATCH), way.sample(BATCH), rtol=0, atol=0)
    way.forget()
    assert way.state_bytes() == 0


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_magcaches_steps_follow_from_its_ratios(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    cached = hooked_blocks.mag_cache(WORK, BATCH, compiled)
    for fields in ({"threshold": 0.3, "max_skip_steps": 3, "retention_ratio": 0.2}, {"threshold": 0.1}):
        way = Setting(cached, **{"max_skip_steps": 2, "retention_ratio": 0.0, **fields})
        way.sample(BATCH)
        told = hooked_blocks.mag_computes(cached.config.mag_ratios, **way.fields)
        assert told == way.computed()
