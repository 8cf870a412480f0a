"""What a point is compared with: the best mixture of whole-region schedules at its cost."""

from __future__ import annotations

from benchmarks.hull import hull_of, on_hull

POINTS = [(0.2, 40.0), (0.3, 44.0), (0.4, 52.0), (0.5, 51.0)]


def test_it_is_the_upper_one_and_concave() -> None:
    assert hull_of(POINTS) == [(0.2, 40.0), (0.4, 52.0), (0.5, 51.0)]


def test_more_cost_never_lowers_what_is_compared_with() -> None:
    hull = hull_of(POINTS)
    assert on_hull(hull, 0.25) == 43.0
    assert on_hull(hull, 0.45) == 52.0
    assert on_hull(hull, 0.1) is None
    assert on_hull(hull, 0.6) is None
