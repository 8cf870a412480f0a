"""Row kinds by region kind and layer, and plans as schedules."""

from __future__ import annotations

import pytest

from moeca_compile.planner.search import rows
from moeca_compile.planner.search.rows import Plan, RowType, atoms_of, row_kinds, row_of, schedule_of, uniform_letters
from moeca_compile.schedule import Action, Partial, Schedule

KINDS = ("attention", "experts") * 3
LAYERS = (0, 0, 1, 1, 2, 2)
ROWS = row_kinds(KINDS, LAYERS)


def test_each_letter_computes_its_part() -> None:
    assert {letter: [i for i, one in enumerate(row) if one] for letter, row in ROWS.items()} == {
        "C": [0, 1, 2, 3, 4, 5],
        "F": [],
        "A": [0, 2, 4],
        "X": [1, 3, 5],
        "E": [0, 1, 4, 5],
        "H": [0, 1],
        "M": [2, 3],
        "T": [4, 5],
    }


def test_row_kinds_that_say_nothing_new_are_left_out() -> None:
    assert set(row_kinds(("span",), (0,))) == {"C", "F"}
    assert set(row_kinds(("experts",) * 3, (0, 1, 2))) == {"C", "F", "H", "M", "T", "E"}
    assert set(row_kinds(("experts",) * 2, (0, 1))) == {"C", "F", "H", "M"}, "two thirds of two layers"


def test_a_row_type_may_do_something_else_than_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry of the table: every room takes the row from there."""
    some = Partial(rho=0.1, tau=0.05)
    partial = RowType("P", "part of the experts", lambda kind, layer, depth: some if kind == "experts" else None)
    monkeypatch.setattr(rows, "ROW_TYPES", (partial,))
    found = row_kinds(KINDS, LAYERS)
    assert set(found) == {"C", "F", "P"}
    assert row_of(found["P"], order=1) == (Action.FORECAST, some) * 3
    assert atoms_of(found, "CFP") == ((0, 2, 4), (1, 3, 5))
    assert schedule_of(Plan("CPF"), list("abcdef"), found).rows[1] == row_of(found["P"], order=1)


def test_atoms_are_told_apart_by_the_letters_in_use() -> None:
    assert atoms_of(ROWS, "CF") == ((0, 1, 2, 3, 4, 5),)
    assert atoms_of(ROWS, "CFA") == ((0, 2, 4), (1, 3, 5))
    assert atoms_of(ROWS, "CFAH") == ((0,), (1,), (2, 4), (3, 5))


def test_a_plan_becomes_a_schedule() -> None:
    forecast, reuse = (schedule_of(Plan("CAF", f"order-{n}"), list("abcdef"), ROWS) for n in (2, 0))
    assert forecast.order == 2
    assert forecast.rows[1] == (Action.COMPUTE, Action.FORECAST) * 3
    assert reuse.rows[2] == (Action.REUSE,) * 6
    full = schedule_of(Plan("CC", "order-2"), list("abcdef"), ROWS)
    assert (full.order, full.depth(0)) == (0, 0)
    assert row_of((Action.COMPUTE, None), 1) == (Action.COMPUTE, Action.FORECAST)


@pytest.mark.parametrize(("interval", "warmup"), [(2, 1), (3, 1), (4, 3), (5, 4)])
def test_uniform_letters_are_what_a_uniform_schedule_does(interval: int, warmup: int) -> None:
    schedule = Schedule.uniform(interval, warmup=warmup)
    rows = (schedule.rows[schedule.row_index(step) or 0][0] for step in range(30))
    assert uniform_letters(30, interval, warmup) == "".join(row.value for row in rows)
