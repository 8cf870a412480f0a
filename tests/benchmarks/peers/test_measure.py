"""Measuring: turns, what is noted when, and the figures of a setting; the whole in its quick form is slow."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.peers import __main__ as peers
from benchmarks.peers import measure, memory, quality
from benchmarks.peers.way import Family
from benchmarks.peers.workload import Batch, Size, Truth, Workload
from benchmarks.peers.workloads.trained_digits import TrainedDigits

SIZE = Size(digits=2, rounds=3, steps=4, converged=4)
WORK = TrainedDigits(SIZE)


class Stub:
    """Draws the noise again, a little off; its MACs are those of the batch that it drew last."""

    def __init__(self, error: float = 0.1) -> None:
        self.error, self.spent = error, 0.0

    def sample(self, batch: Batch) -> Tensor:
        self.spent = batch.noise.abs().mean().item()
        return batch.noise + self.error

    def macs(self) -> float:
        return self.spent

    def state_bytes(self) -> int:
        return 7

    def forget(self) -> None:
        self.spent = 0.0


def opened(work: Workload) -> Mapping[str, Stub]:
    return {"": Stub()}


def truth() -> Truth:
    batches = WORK.batches()
    noise = torch.cat([batch.noise for batch in batches])
    return Truth(batches, noise, noise)


@pytest.mark.slow
def test_each_round_draws_its_own_digits_and_notes_what_they_cost() -> None:
    lane = measure.Lane(Family("stub", "peer", "", opened), "", Stub())
    known = truth()
    measure.first_runs([lane], known.batches[0])
    base = measure.Lane(Family("base", "plain", "", opened), "", Stub(0.0))
    measure.timed(base, [lane], known.batches)
    assert len(lane.clocks) == len(lane.speedups) == SIZE.rounds
    assert len(base.clocks) == 2 * SIZE.rounds, "before and after"
    torch.testing.assert_close(torch.cat(base.images), known.uncached)
    torch.testing.assert_close(torch.cat(lane.images), known.uncached + 0.1)
    assert lane.macs == pytest.approx([batch.noise.abs().mean().item() for batch in known.batches])
    found = measure.point(lane, WORK, known)
    assert found["speedup"] > 0
    assert found["uncached"]["psnr_db"] == pytest.approx(10 * math.log10(4 / 0.01), abs=0.01)
    assert found["compile_seconds"] is None, "not compiled with empty caches"


class Telling(Stub):
    """Says before what it will keep."""

    def told_bytes(self) -> int:
        assert self.spent == 0, "asked after the first trajectory"
        return 7

    def held_bytes(self) -> int:
        return 7 if self.error else 8


def test_state_is_told_before_the_first_trajectory_and_must_be_kept() -> None:
    lanes = [measure.Lane(Family("stub", "moeca", "", opened), "N=2", one) for one in (Telling(), Telling(0.0), Stub())]
    measure.first_runs(lanes, truth().batches[0])
    assert measure.told(lanes[0]) == {"told_bytes": 7}
    assert measure.told(lanes[2]) == {}
    with pytest.raises(RuntimeError, match="stub, N=2: 7 bytes of state were told, the trajectory kept 8"):
        measure.told(lanes[1])


def test_worst_is_of_the_worst_digits_alone() -> None:
    images = torch.zeros(40, 1, 16, 16)
    off = images + 0.1
    off[7] = 0.4
    off[9] = 0.4
    found = quality.fidelity(off, images)
    assert found["psnr_db_worst"] == pytest.approx(10 * math.log10(4 / 0.16), abs=0.01)
    assert found["psnr_db"] > found["psnr_db_worst"]


def test_ssim_is_one_for_equals_and_falls_with_noise() -> None:
    pytest.importorskip("skimage", reason="scikit-image isn't installed: pip install -e '.[bench]'")
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert quality.ssim(images, images) == pytest.approx(1)
    assert quality.ssim(images, images + 0.3 * torch.randn_like(images)) < 0.9


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="the peak of the resident set is read from Linux's /proc")
def test_peak_memory_sees_what_was_freed_again() -> None:
    taken = memory.peak_bytes(lambda: torch.ones(8 << 20))
    assert taken is not None
    assert 24 << 20 < taken < 64 << 20


def test_an_unknown_heat_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--again", "nobody"])
    assert "no heat is named nobody; there are: fewer steps" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_run_writes_every_figure_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("cache_dit", reason="cache-dit isn't installed: pip install -e '.[bench]'")
    peers.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "peers.json").read_text())
    assert list(written["heats"]) == ["peers", "moeca"]
    sides = {point["side"] for heat in written["heats"].values() for point in heat["points"]}
    assert sides == {"plain", "fewer steps", "peer", "moeca"}
    peers.main(["--quick", "--out", str(tmp_path), "--again", "moeca"])
    again = json.loads((tmp_path / "peers.json").read_text())
    assert again["heats"]["peers"] == written["heats"]["peers"]
