"""The comparison of models with and without long skips runs, in its quick form, and its figures are in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import skip
from examples import digits, skip_dit
from examples.dit_moe import randomize_
from examples.skip_dit import SkipDiT


def tiny(skips: bool = True) -> SkipDiT:
    model = SkipDiT(4, 32, 2, input_size=digits.SIZE, in_channels=1, num_classes=digits.CLASSES, skips=skips)
    return randomize_(model, seed=1).eval()


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skip_dit, "load_digits", lambda skips: tiny(skips=skips))
    skip.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "skip.json").read_text())
    results = {skip.Way(r["model"], r["keeps"], r["order"]): r for r in written["results"]}
    assert tuple(results) == skip.WAYS
    assert set(written["uncached_class_accuracy"]) == set(skip.MODELS)
    for way, result in results.items():
        # three of the steps whole, three with two of the four blocks; "fewer steps" rounds to whole ones
        assert result["mac_fraction"] == pytest.approx(0.75, abs=0.09), way
        assert 0 < result["psnr_db"] < 100, way


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> skip.Bench:
    monkeypatch.setattr(skip_dit, "load_digits", lambda skips: tiny(skips))
    return skip.Bench("skip", skip.QUICK)


@pytest.mark.slow
def test_share_of_the_macs_is_what_moeca_executes(bench: skip.Bench) -> None:
    _, executed = bench.run(skip.Way("skip", skip.VALUE, order=1), kept=1, interval=3)
    assert bench.share(kept=1, interval=3) == pytest.approx(executed, rel=1e-6)


def test_psnr_is_against_the_models_own_digits(bench: skip.Bench) -> None:
    assert bench.result(skip.Way("skip", skip.VALUE), kept=1, interval=1).psnr_db == float("inf")
    assert bench.result(skip.Way("skip", skip.VALUE), kept=1, interval=2).psnr_db < 60


def test_fewer_steps_spend_the_same(bench: skip.Bench) -> None:
    result = bench.result(skip.Way("skip", skip.FEWER), kept=1, interval=3)
    assert result.mac_fraction == pytest.approx(bench.share(kept=1, interval=3), abs=0.5 / skip.QUICK.steps)
