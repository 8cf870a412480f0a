"""The benchmarks of PARTIAL rows run, in their quick forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import branches, partial
from benchmarks.protocol import Timing


@pytest.mark.slow
def test_every_row_of_the_digits_models_is_timed(tmp_path: Path) -> None:
    partial.main(["--narrow", "--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "partial_narrow.json").read_text())
    for name in ("DiT-MoE", "DSMoE"):
        assert set(written[name]["one_step"]) == {*partial.NARROW, *partial.WHOLE, *partial.WRITTEN_OUT}
        low, middle, high = written[name]["of_the_experts_time"]["tau 0.05"]
        assert 0 < low <= middle <= high


def test_equal_time_is_a_full_step_and_three_of_the_row_over_four_full_steps() -> None:
    ms = {"full": 110.0, "tau 0": 20.0, "whole full": 100.0, "whole forecast": 10.0, "written out, full": 120.0}
    timings = {kind: Timing((one, one)) for kind, one in (ms | {"written out, tau 0": 40.0}).items()}
    expected = {"tau 0": 170 / 400, "whole forecast": 130 / 400, "written out, tau 0": 240 / 400}
    assert partial.equal_time(timings) == pytest.approx(expected)


@pytest.mark.parametrize(("asked", "file"), [
    ([], "partial_narrow"), (["--few", "DSMoE"], "partial_DSMoE"), (["--short"], "partial_short"),
    (["--short", "--few", "DSMoE"], "partial_short_DSMoE"),
])  # fmt: skip
def test_what_is_measured_has_its_own_file(
    asked: list[str], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(
        network: object, rounds: int, rows: Sequence[str], written_out: bool, in_16_bits: bool
    ) -> dict[str, Timing]:
        assert (written_out, in_16_bits) == ("--short" not in asked, "--few" in asked)
        return {kind: Timing((1.0, 2.0, 4.0)) for kind in (*rows, *partial.WHOLE)} | {"whole full": Timing((9.0,) * 3)}

    monkeypatch.setattr(partial, "measure_narrow", measured)
    monkeypatch.setattr(partial, "DIGITS", dict.fromkeys(partial.DIGITS, torch.nn.Identity))
    partial.main(["--narrow", *asked, "--out", str(tmp_path)])
    assert [path.stem for path in tmp_path.iterdir()] == [file]


@pytest.mark.slow
def test_glyphs_have_time_and_quality_of_each_row(tmp_path: Path) -> None:
    partial.main(["--glyphs", "--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "partial_glyphs.json").read_text())
    kinds = {"whole forecast", "whole, attention computed", "tau 0", "tau 0.04", "attention computed, tau 0.04"}
    assert set(written["uniform_4_psnr_db"]) == set(written["uniform_4_of_full_time"]) == kinds


@pytest.mark.slow
def test_every_operator_of_a_layer_is_timed(tmp_path: Path) -> None:
    branches.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "branches.json").read_text())
    for name in branches.LAYERS:
        low, middle, high = written[name]["of_the_experts_time"]["branches_, tau 0.05"]
        assert 0 < low <= middle <= high
