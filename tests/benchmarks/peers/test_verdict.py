"""The verdict: levels by hulls, never more than a contender reached, and missed where it is missed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peers import verdict


def point(family: str, speedup: float, psnr: float, accuracy: float = 1.0) -> dict[str, Any]:
    """A setting, as far as a verdict needs it."""
    return {
        "family": family, "speedup": speedup, "macs": 1 / speedup, "class_accuracy": accuracy,
        "uncached": {"psnr_db": psnr}, "converged": {"psnr_db": psnr},
    }  # fmt: skip


PLAIN = point("eager, as shipped", 0.8, 140)
PEERS = [point("TeaCache-like", 1.25, 50), point("TeaCache-like", 6, 30), point("FORA-like copy", 2, 35)]
OURS = [point("moeca calibrated", 1.25, 60), point("moeca calibrated", 6, 40)]


def test_families_are_grouped_and_side_runs_are_left_out() -> None:
    assert verdict.group_of("DBCache static mask + Taylor 1") == "cache-dit, static masks"
    assert verdict.group_of("DBCache F1B0 W8") == "cache-dit, DBCache"
    assert verdict.group_of("moeca calibrated, on onnxruntime") == verdict.OTHER_ENGINE
    for aside in ("moeca calibrated, eager", "DBCache F1B0 W8, never a hit", "torch.compile, as shipped"):
        assert verdict.group_of(aside) is None


def test_a_level_is_between_two_settings_and_never_beyond_the_best() -> None:
    hull = verdict.hulls(PEERS)["TeaCache-like"]
    assert verdict.at(hull, 6) == pytest.approx(30)
    assert verdict.at(hull, 7) is None
    assert verdict.at(hull, 1.1) == 50
    middle = 2 / (1 / 1.25 + 1 / 6)  # halfway in time
    assert verdict.at(hull, middle) == pytest.approx(40)


def test_both_targets_are_met_by_ten_decibels() -> None:
    assert [target.met for target in verdict.judge([PLAIN, *PEERS, *OURS])] == [True, True]


def test_a_peer_that_is_ahead_somewhere_makes_it_missed() -> None:
    ahead, _ = verdict.judge([PLAIN, *PEERS, *OURS, point("DBCache F1B0 W8", 2, 58)])
    assert not ahead.met
    assert "least" in ahead.measured
    assert "2 dB or more at" in ahead.measured


def test_what_reaches_no_speedup_is_missed() -> None:
    ahead, paper = verdict.judge([PLAIN, *PEERS, point("moeca calibrated", 2, 60)])
    assert (ahead.met, paper.met) == (False, False)
    assert "nothing as fast" in ahead.measured
    assert paper.measured == "nothing as fast"


def test_lost_accuracy_is_missed() -> None:
    _, paper = verdict.judge([PLAIN, *PEERS, OURS[0], point("moeca calibrated", 6, 44, accuracy=0.9)])
    assert not paper.met
    assert "10.0 points" in paper.measured


def test_another_engine_is_not_held_against_torch() -> None:
    found = verdict.hulls([*PEERS, *OURS, point("moeca calibrated, on onnxruntime", 6, 60)])
    assert verdict.best(found, 5, peers=False) == ("moeca, calibrated", verdict.at(found["moeca, calibrated"], 5))
