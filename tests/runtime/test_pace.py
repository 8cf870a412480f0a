"""Which row an adaptive schedule takes, from figures alone."""

from __future__ import annotations

import math

import pytest

from moeca_compile.errors import ScheduleError
from moeca_compile.runtime.pace import Pace
from moeca_compile.schedule.adaptive import Adaptive


def walk(adaptive: Adaptive, figures: list[float]) -> str:
    """The rows of as many steps, each of which shows its figure to the next."""
    pace, rows, shown = Pace(), "", None
    for step, figure in enumerate(figures):
        row = pace.choose(adaptive, step, shown)
        pace.ran(row == 0)
        rows, shown = rows + str(row), figure
    return rows


def test_full_steps_where_the_drift_since_the_last_one_reaches_the_threshold() -> None:
    assert walk(Adaptive((0.3,), warmup=1), [0.11] * 9) == "011101110"


def test_a_still_stream_is_cached_until_the_limit() -> None:
    assert walk(Adaptive((0.3,), warmup=2, most=3), [0.0] * 10) == "0011101110"


def test_a_step_in_between_for_each_threshold() -> None:
    assert walk(Adaptive((0.5, 0.2), warmup=1), [0.11] * 8) == "02211102"


def test_a_floor_makes_steps_full_and_a_ceiling_keeps_them_cheap() -> None:
    assert walk(Adaptive((9.0,), warmup=1, floor=0.5), [0.0] * 6) == "010101"
    assert walk(Adaptive((0.01,), warmup=1, ceiling=0.25), [1.0] * 9) == "011111101"


def test_the_limit_comes_before_the_ceiling() -> None:
    assert walk(Adaptive((9.0,), warmup=1, most=1, ceiling=0.1), [0.0] * 4) == "0101"


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_a_figure_that_isn_t_finite_asks_for_a_full_step(figure: float) -> None:
    assert walk(Adaptive((0.3,), warmup=1), [0.0, figure, 0.0, 0.0]) == "0101"[:2] + "01"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"thresholds": ()}, "expected positive ones that fall"),
        ({"thresholds": (0.1, 0.2)}, "expected positive ones that fall"),
        ({"thresholds": (0.1, 0.1)}, "expected positive ones that fall"),
        ({"thresholds": (0.0,)}, "expected positive ones that fall"),
        ({"thresholds": (0.1,), "warmup": 0}, "warmup=0 and most=12, expected at least 1"),
        ({"thresholds": (0.1,), "floor": 0.6, "ceiling": 0.5}, "floor=0.6 and ceiling=0.5"),
    ],
)
def test_bad_bounds_are_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        Adaptive(**wrong)  # type: ignore[arg-type]
