"""The cache of one stream: what it has written, what it may read, and the forecast that its age asks for."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeca_compile.graph.variant import SLOTS, StateSlot
from moeca_compile.runtime.state import StreamState
from moeca_compile.schedule import Action, Row
from moeca_compile.schedule.forecast import newton

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


# -- what may be read -------------------------------------------------------------------------------------------------


def test_a_new_state_runs_nothing_but_a_full_row() -> None:
    state = state_of()
    assert not state.can_run((R, R), 0)
    assert not state.can_run((C, F), 0)
    assert state.coefficients(0) == ((0.0, 0.0),) * 2


def test_a_step_after_a_gap_may_not_read() -> None:
    state = state_of((0, (C, C)))
    assert state.can_run((R, R), 1)
    assert not state.can_run((R, R), 2)
    assert not state.can_run((R, R), 0)


def test_only_regions_that_were_computed_may_be_read() -> None:
    state = state_of((0, (C, R)))
    assert state.can_run((R, C), 1)
    assert not state.can_run((C, R), 1)


def test_a_commit_keeps_what_it_does_not_write() -> None:
    assert state_of((0, (C, C)), (1, (C, R)), (2, (R, R))).tensors == ["0@1", "1@0"]


def test_values_and_writes_must_agree_in_number() -> None:
    with pytest.raises(ValueError, match="zip"):
        StreamState(PLAIN, 2).commit(0, (C, C), [0, 1], ["only one"])


def test_clear_forgets_everything() -> None:
    state = state_of((0, (C, C)), (1, (C, C)))
    state.clear()
    assert state == StreamState(PLAIN, 2)


def test_a_new_output_pushes_the_older_ones_of_its_region_on() -> None:
    """Regions of every depth, the last with two outputs: none takes what is another's."""
    layout = layout_of((0, 0, 2), (1, 0, 1), (2, 0, 3), (2, 1, 3))
    row, other = (C, C, C), (C, R, R)
    state = state_of((0, row), (1, other), (2, row), (5, row), layout=layout)
    assert state.tensors == ["0@5", "0@2", "1@5", "2@5", "2@2", "2@0", "2@5", "2@2", "2@0"]
    assert state.history == [(5, 2, 1), (5, 2, 0), (5, 2, 0)]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_tensors_are_those_of_the_last_computed_steps(computed: list[tuple[bool, bool]]) -> None:
    rows = [(step, tuple(C if flag else R for flag in flags)) for step, flags in enumerate(computed)]
    state = state_of(*rows, layout=layout_of((0, 0, 3), (1, 0, 3)))
    for region in range(2):
        steps = [step for step, flags in enumerate(computed) if flags[region]][::-1][:3]
        assert state.history[region] == tuple(steps)
        wanted = [f"{region}@{step}" for step in steps] + [None] * (3 - len(steps))
        assert state.tensors[3 * region : 3 * region + 3] == wanted
    assert state.can_run((R, R), len(computed)) == all(state.history)


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
    c0, c1 = newton(step, seen)
    y0, y1, y2 = (*values[: len(seen)], *[0] * (3 - len(seen)))
    forecast = y0 + c0 * (y0 - y1) + c1 * (y1 - y2)
    assert forecast == pytest.approx(float(lagrange(step, dict(zip(seen, map(Fraction, values), strict=False)))))


def test_the_order_is_what_the_layout_keeps() -> None:
    """Three steps were computed, but a region that keeps one or two outputs forecasts with those."""
    row = (C, C, C)
    state = state_of((0, row), (2, row), (3, row), layout=layout_of((0, 0, 1), (1, 0, 2), (2, 0, 3)))
    assert state.coefficients(5) == (newton(5, [3]), newton(5, [3, 2]), newton(5, [3, 2, 0]))
    assert state.coefficients(5)[0] == (0.0, 0.0)
    assert state.coefficients(5)[1] == (2.0, 0.0)


def test_missing_history_lowers_the_order() -> None:
    layout = layout_of((0, 0, 3))
    assert state_of((4, (C,)), layout=layout).coefficients(6) == ((0.0, 0.0),)
    assert state_of((2, (C,)), (4, (C,)), layout=layout).coefficients(6) == ((1.0, 0.0),)
