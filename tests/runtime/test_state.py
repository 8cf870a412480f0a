"""The cache of one stream: what it has written, what it may read, and the forecast that its age asks for."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeca_compile.graph.variant import SLOTS, StateSlot
from moeca_compile.runtime.state import StreamState
from moeca_compile.schedule import Action, Row
from moeca_compile.schedule.forecast import COPY, MAX_KEPT, coefficients, polynomial

C, R, F = Action.COMPUTE, Action.REUSE, Action.FORECAST


def layout_of(*outputs: tuple[int, int, int]) -> tuple[StateSlot, ...]:
    """Slots for (region, output, how many values are kept), in this order."""
    kinds = [(region, output, slot) for region, output, depth in outputs for slot in SLOTS[:depth]]
    return tuple(
        StateSlot(f"state_{i:03d}", region, output, slot, (1,), "float32", "cpu", 4)
        for i, (region, output, slot) in enumerate(kinds)
    )


PLAIN = layout_of((0, 0, 1), (1, 0, 1))  # two regions, their last output each


def state_of(*steps: tuple[int, Row], layout: tuple[StateSlot, ...] = PLAIN) -> StreamState:
    """Every COMPUTE writes `region@step` to each y0 of its region."""
    state = StreamState(layout, max(slot.region for slot in layout) + 1)
    for step, row in steps:
        writes = [i for i, one in enumerate(layout) if one.slot == SLOTS[0] and row[one.region] is C]
        state.commit(step, row, writes, [f"{layout[i].region}@{step}" for i in writes])
    return state


# -- the forecast -----------------------------------------------------------------------------------------------------


def lagrange(step: int, values: dict[int, Fraction]) -> Fraction:
    """The interpolating polynomial in its textbook form."""
    total = Fraction(0)
    for s, value in values.items():
        weight = Fraction(1)
        for other in values:
            if other != s:
                weight *= Fraction(step - other, s - other)
        total += weight * value
    return total


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=3, unique=True).map(lambda steps: sorted(steps, reverse=True)),
    st.integers(1, 9),
    st.lists(st.integers(-9, 9), min_size=3, max_size=3),
)
def test_the_forecast_is_the_interpolating_polynomial(seen: list[int], ahead: int, values: list[int]) -> None:
    step = seen[0] + ahead
    weights = polynomial(step, seen)
    assert len(weights) == MAX_KEPT
    assert sum(weights) == pytest.approx(1)
    assert not any(weights[len(seen) :])
    forecast = sum(weight * value for weight, value in zip(weights, values, strict=False))
    assert forecast == pytest.approx(float(lagrange(step, dict(zip(seen, map(Fraction, values), strict=False)))))


def test_the_order_is_what_the_layout_keeps() -> None:
    """Three steps were computed, but a region that keeps one or two outputs forecasts with those."""
    row = (C, C, C)
    state = state_of((0, row), (2, row), (3, row), layout=layout_of((0, 0, 1), (1, 0, 2), (2, 0, 3)))
    assert coefficients(5, state.history, state.depths) == (
        polynomial(5, [3]),
        polynomial(5, [3, 2]),
        polynomial(5, [3, 2, 0]),
    )
    assert coefficients(5, state.history, state.depths)[0] == COPY
    assert coefficients(5, state.history, state.depths)[1] == (3.0, -2.0, 0.0, 0.0)


def test_missing_history_lowers_the_order() -> None:
    layout = layout_of((0, 0, 3))
    once, twice = state_of((4, (C,)), layout=layout), state_of((2, (C,)), (4, (C,)), layout=layout)
    assert coefficients(6, once.history, once.depths) == (COPY,)
    assert coefficients(6, twice.history, twice.depths) == ((2.0, -1.0, 0.0, 0.0),)
