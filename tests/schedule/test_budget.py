"""Budgets: what is read, and what is refused with which words."""

from __future__ import annotations

import pytest

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.budget import Budget


def test_every_kind_and_combinations_are_read() -> None:
    assert Budget.parse("macs:0.26") == Budget(macs=0.26)
    assert Budget.parse("latency:0.4") == Budget(latency=0.4)
    assert Budget.parse("speedup:2.5") == Budget.parse("latency:0.4")
    assert Budget.parse("psnr:45, state:64MiB") == Budget(psnr_db=45.0, state_bytes=64 * 2**20)
    assert Budget.parse("macs:1,state:1.5GB").state_bytes == 1_500_000_000


def test_a_budget_prints_as_it_is_read() -> None:
    for text in ("macs:0.26", "latency:0.4,state:1048576", "macs:0.5,psnr:45"):
        assert str(Budget.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mac:0.3", "expected macs:0.26"),
        ("macs:0", "above 0"),
        ("macs:1.2", "at most 1"),
        ("macs:much", "not a number"),
        ("macs:nan", "above 0"),
        ("macs:0.2,macs:0.3", "limits macs twice"),
        ("2x", r"did you mean speedup:2\?"),
        ("1.5 X", r"did you mean speedup:1.5\?"),
        ("speedup:0.5", "at least 1"),
        ("speedup:inf", "at least 1"),
        ("speedup:nan", "at least 1"),
        ("speedup:2,latency:0.5", "limits latency twice"),
        ("psnr:nan", "finite number of decibels"),
        ("macs:0.5,state:" + "9" * 400, "expected bytes"),
        ("state:64MiB", "doesn't limit the work"),
        ("macs:0.3,state:lots", "expected bytes such as 64MiB"),
        ("", "expected macs:0.26"),
    ],
)
def test_bad_budgets_say_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        Budget.parse(text)
