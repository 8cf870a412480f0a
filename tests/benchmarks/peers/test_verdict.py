"""The verdict: levels by hulls, never more than a contender reached, and missed where it is missed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peers import verdict


def point(family: str, speedup: float, psnr: float) -> dict[str, Any]:
    """A setting, as far as a verdict needs it."""
    return {
        "family": family, "speedup": speedup, "macs": 1 / speedup,
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


def test_a_family_is_met_by_ten_decibels_and_names_how_many_were_tried() -> None:
    (target,) = verdict.judge([PLAIN, *PEERS, *OURS])
    assert target.met
    assert target.name == "moeca, calibrated (2 settings), against 2 families of peers with 3 settings"


def test_each_family_is_judged_by_itself() -> None:
    worse = [point("moeca uniform, order 1", 1.25, 45), point("moeca uniform, order 1", 6, 29)]
    uniform, calibrated = verdict.judge([PLAIN, *PEERS, *OURS, *worse])
    assert (uniform.name.split(" (")[0], uniform.met) == ("moeca, uniform", False)
    assert (calibrated.name.split(" (")[0], calibrated.met) == ("moeca, calibrated", True)


def test_what_is_fitted_to_the_converged_solution_is_judged_by_it() -> None:
    far = [{**point("moeca fitted output, converged", one, 44), "converged": {"psnr_db": 60}} for one in (1.25, 6)]
    (target,) = verdict.judge([PLAIN, *PEERS, *far])
    assert target.met
    assert target.name.startswith(f"{verdict.SOLVER}, to the converged solution (2 settings)")


def test_a_peer_that_is_ahead_somewhere_makes_it_missed() -> None:
    (ahead,) = verdict.judge([PLAIN, *PEERS, *OURS, point("DBCache F1B0 W8", 2, 58)])
    assert not ahead.met
    assert "least" in ahead.measured
    assert "2 dB or more at" in ahead.measured


def test_what_reaches_no_speedup_is_missed() -> None:
    (some,) = verdict.judge([PLAIN, *PEERS, point("moeca calibrated", 2, 60)])
    assert not some.met
    assert "nothing as fast as 2.05x" in some.measured
    (none,) = verdict.judge([PLAIN, *PEERS, point("moeca calibrated", 1.2, 60)])
    assert (none.met, none.measured) == (False, "nothing as fast as 1.5x")


def test_the_worst_digits_have_a_hull_of_their_own() -> None:
    one = {**point("TeaCache-like", 2, 50), "uncached": {"psnr_db": 50, "psnr_db_worst": 31}}
    assert verdict.hulls([one], figure="psnr_db_worst") == {"TeaCache-like": [(0.5, 31)]}


def test_another_engine_is_not_held_against_torch() -> None:
    found = verdict.hulls([*PEERS, *OURS, point("moeca calibrated, on onnxruntime", 6, 60)])
    assert verdict.OTHER_ENGINE in found
    assert verdict.ours(found) == ["moeca, calibrated"]
