"""The cache of one stream: what it has written, what it may read, and how far away that is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeca_compile.runtime.state import StreamState
from moeca_compile.schedule import Action, Row

C, R, F = Action.COMPUTE, Action.REUSE, Action.FORECAST


def state_of(*steps: tuple[int, Row]) -> StreamState:
    """Two regions with one slot each; every COMPUTE writes `region@step`."""
    state = StreamState(2, 2)
    for step, row in steps:
        writes = [region for region, action in enumerate(row) if action is C]
        state.commit(step, row, writes, [f"{region}@{step}" for region in writes])
    return state


def test_a_new_state_runs_nothing_but_a_full_row() -> None:
    state = state_of()
    assert not state.can_run((R, R), 0)
    assert not state.can_run((C, F), 0)
    assert state.distances(0) == ((0.0,) * 4,) * 2


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
        StreamState(2, 2).commit(0, (C, C), [0, 1], ["only one"])


def test_clear_forgets_everything() -> None:
    state = state_of((0, (C, C)), (1, (C, C)))
    state.clear()
    assert state == StreamState(2, 2)


def test_distances_are_newtons() -> None:
    """Region 0 was computed at 0 and 3, region 1 at 3 only; now it is step 5."""
    state = state_of((0, (C, R)), (3, (C, C)))
    assert state.distances(5) == ((2.0, 2.0 * 5.0, 0.5, 0.2), (2.0, 0.0, 0.5, 0.0))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_distances_follow_the_last_two_computed_steps(computed: list[tuple[bool, bool]]) -> None:
    state = StreamState(2, 2)
    for step, flags in enumerate(computed):
        row = tuple(C if flag else R for flag in flags)
        writes = [region for region, flag in enumerate(flags) if flag]
        state.commit(step, row, writes, [step] * len(writes))
    now = len(computed)
    for region in range(2):
        steps = [step for step, flags in enumerate(computed) if flags[region]][::-1]
        ahead = now - steps[0] if steps else 0
        further = now - steps[1] if len(steps) > 1 else 0
        expected = (ahead, ahead * further, 1 / ahead if ahead else 0, 1 / further if further else 0)
        assert state.distances(now)[region] == pytest.approx(expected)
        assert state.tensors[region] == (steps[0] if steps else None)
        assert state.can_run((R, R), now) == all(any(flags[r] for flags in computed) for r in range(2))
