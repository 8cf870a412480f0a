"""What a number has to do with sizes, told by examples: each case's hidden rule is checked at a further size."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moeca_compile.lowering.inductor.sizes.expressions import Dim, Evaluator, Finder

H, W, T = Dim(0, 2), Dim(0, 3), Dim(1, 1)
SIZES = [{H: 16, W: 24, T: 10}, {H: 24, W: 40, T: 10}, {H: 40, W: 40, T: 12}]
FURTHER = {H: 56, W: 8, T: 7}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("an edge", lambda h, w, t: h),
        ("half an edge", lambda h, w, t: h // 2),
        ("channels by rows", lambda h, w, t: 96 * w),
        ("pixels", lambda h, w, t: h * w),
        ("patches", lambda h, w, t: h * w // 4),
        ("patches and text", lambda h, w, t: h * w // 4 + t),
        ("patches, text and a class", lambda h, w, t: h * w // 4 + t + 1),
        ("edges", lambda h, w, t: h + w),
        ("from the end", lambda h, w, t: -t),
        ("one before the end", lambda h, w, t: t - 1),
    ],
)
def test_a_rule_is_found_from_three_sizes(name: str, rule: Callable[[int, int, int], int]) -> None:
    finder = Finder()
    for dim in (H, W, T):
        assert finder.add_dim([sizes[dim] for sizes in SIZES], dim) == dim
    tokens = finder.find([sizes[H] * sizes[W] // 4 for sizes in SIZES])  # a graph says it in some view before
    assert tokens is not None
    found = finder.find([rule(sizes[H], sizes[W], sizes[T]) for sizes in SIZES])
    assert found is not None, name
    assert Evaluator(FURTHER.__getitem__).value(found) == rule(FURTHER[H], FURTHER[W], FURTHER[T])


def test_a_size_that_follows_from_others_is_none_of_its_own() -> None:
    finder = Finder()
    assert finder.add_dim([64, 144], Dim(0, 1)) == Dim(0, 1)
    joint = finder.add_dim([80, 160], Dim(3, 1))
    assert finder.dims == [Dim(0, 1)]
    assert Evaluator({Dim(0, 1): 100}.__getitem__).value(joint) == 116


def test_what_follows_from_no_size_is_not_made_up() -> None:
    finder = Finder()
    finder.add_dim([4, 6, 8, 10], Dim(0, 1))
    assert finder.find([3, 14, 15, 92]) is None
