"""What is measured between steps, on values made for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeca_compile.planner.drift.changes import (
    Fractions,
    aligned,
    dense,
    forecasts,
    intraclass,
    load,
    region_changes,
    routing,
)
from moeca_compile.planner.drift.routed import Reading

EXPERTS = 5


def reading(ids: list[list[int]], y: Tensor | None = None, gates: Tensor | None = None) -> Reading:
    chosen = torch.tensor(ids)
    tokens, slots = chosen.shape
    y = torch.ones(tokens, slots, 3) if y is None else y
    gates = torch.full((tokens, slots), 0.5) if gates is None else gates
    return Reading(chosen, gates, y, torch.zeros(tokens, 3), EXPERTS)


def random(seed: int, tokens: int = 12, slots: int = 3) -> Reading:
    dice = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, EXPERTS, generator=dice).topk(slots).indices
    y = torch.randn(tokens, slots, 3, generator=dice)
    return Reading(ids, torch.rand(tokens, slots, generator=dice), y, torch.zeros(tokens, 3), EXPERTS)


def ratio(found: Fractions, what: str) -> list[float]:
    over, under = (torch.as_tensor(one).double().reshape(-1) for one in found[what])
    return (over / under).tolist()


def test_branches_meet_by_expert_not_by_slot() -> None:
    then = reading([[3, 1]], torch.tensor([[[3.0] * 3, [1.0] * 3]]))
    kept, last = aligned(reading([[1, 4]]), then)
    assert kept.tolist() == [[True, False]]
    assert last[0, 0].tolist() == [1.0] * 3


def test_slots_in_another_order_change_nothing() -> None:
    now, then, before = (random(seed) for seed in range(3))
    order = torch.tensor([2, 0, 1])
    turned = Reading(then.ids[:, order], then.gates[:, order], then.y[:, order], then.rest, EXPERTS)
    for measure in (routing, lambda a, b: forecasts(a, b, before), lambda a, b: forecasts(a, before, b)):
        for what, (over, under) in measure(now, then).items():
            again = measure(now, turned)[what]
            torch.testing.assert_close(torch.as_tensor(again[0]), torch.as_tensor(over), msg=what)
            torch.testing.assert_close(torch.as_tensor(again[1]), torch.as_tensor(under), msg=what)


def test_a_whole_output() -> None:
    """Ten tokens go from 0 to 1 and stay, but for one that goes on to 5."""
    before, then, now = torch.zeros(10, 4), torch.ones(10, 4), torch.ones(10, 4)
    now[7] = 5.0
    found = region_changes(now, then, before, tokens=5)
    size = 9 * 4 + 4 * 25
    assert ratio(found, "reuse") == pytest.approx([4 * 16 / size])
    error = 9 * 4 + 4 * 9  # forecast: 2
    assert ratio(found, "forecast") == pytest.approx([error / size])
    assert ratio(found, "worst 10%") == pytest.approx([36 / error])
    assert ratio(found, "worst 25%") == pytest.approx([(36 + 2 * 4) / error])
    assert ratio(found, "reuse at positions") == pytest.approx([0, 0, 64 / (4 + 100), 0, 0])


def test_what_the_first_steps_can_t_say_is_left_out() -> None:
    assert set(region_changes(torch.ones(4, 2), None, None, 4)) == set()
    assert set(region_changes(torch.ones(4, 2), torch.ones(4, 2), None, 4)) == {"reuse", "reuse at positions"}


def test_transitions_and_what_persists() -> None:
    """Of token 0 expert 2 becomes 3, which jumps far; expert 1 moves from 1 to 1.5. Token 1 stays as it is."""
    then = reading([[1, 2], [0, 4]])
    y = torch.ones(2, 2, 3)
    y[0, 0], y[0, 1] = 1.5, 100.0
    found = routing(reading([[1, 3], [0, 4]], y), then)
    assert ratio(found, "transitions") == [0.25]
    assert found["transitions by expert"][0].tolist() == [0, 0, 0, 1, 0]
    assert found["transitions by expert"][1].tolist() == [1, 1, 0, 1, 1]
    assert ratio(found, "branches") == pytest.approx([0.25 / (1.5**2 + 2)])
    assert ratio(found, "branches by expert")[1] == pytest.approx(0.25 / 2.25)
    assert found["branches by expert"][1].tolist()[3] == 0


def test_routing_weights_are_compared_expert_by_expert() -> None:
    now = reading([[1, 3]], gates=torch.tensor([[0.6, 0.4]]))
    then = reading([[3, 2]], gates=torch.tensor([[0.3, 0.7]]))
    assert dense(now).tolist() == [pytest.approx([0, 0.6, 0, 0.4, 0])]
    assert ratio(routing(now, then), "routing") == pytest.approx([0.6 + 0.1 + 0.7])


def test_by_branch_a_linear_change_is_foreseen_whatever_becomes_of_gates_and_experts() -> None:
    """Token 0 keeps its experts, token 1 changes one of them just now; every branch moves evenly."""
    slope = torch.arange(24.0).view(2, 4, 3)[:, :2] + 1
    gates = [torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([[0.2, 0.8], [0.1, 0.9]])]
    before = reading([[1, 2], [0, 4]], 1 + slope, gates[0])
    then = reading([[1, 2], [0, 4]], 1 + 2 * slope, gates[0])
    now = reading([[1, 2], [0, 3]], 1 + 3 * slope, gates[1])
    found = forecasts(now, then, before)
    assert ratio(found, "branch forecast") == pytest.approx([0], abs=1e-12)
    assert ratio(found, "sum forecast")[0] > 0.01
    assert ratio(found, "tokens with transitions") == [0.5]


def test_the_sum_errs_where_experts_change() -> None:
    y = torch.tensor([[[1.0] * 3, [2.0] * 3]] * 4)
    same = reading([[1, 2]] * 4, y)
    other = y.clone()
    other[3, 1] = 9.0
    found = forecasts(reading([[1, 2]] * 3 + [[1, 4]], other), same, same)
    assert ratio(found, "at transitions") == [1.0]
    assert ratio(found, "tokens with transitions") == [0.25]
    assert ratio(found, "branch forecast") == [0.0]


def test_a_transition_one_gap_ago_still_spoils_the_sum_and_its_branch_is_copied() -> None:
    before = reading([[1, 3]], torch.full((1, 2, 3), 5.0))
    then, now = (reading([[1, 2]], torch.full((1, 2, 3), value)) for value in (6.0, 7.0))
    found = forecasts(now, then, before)
    assert ratio(found, "tokens with transitions") == [1.0]
    # expert 1 is extrapolated to 7, expert 2 copied: 6 where it is 7, and weighed by a half
    assert ratio(found, "branch forecast") == pytest.approx([0.25 * 3 / (3 * 49)])


def test_load_by_expert_and_position() -> None:
    """Two samples of two tokens."""
    found = load(reading([[0, 1], [0, 2], [0, 1], [3, 2]]), tokens=2)
    assert ratio(found, "load") == pytest.approx([3 / 8, 2 / 8, 2 / 8, 1 / 8, 0])
    places = torch.tensor(ratio(found, "load at positions")).view(2, EXPERTS)
    assert places.tolist() == [[2 / 8, 2 / 8, 0, 0, 0], [1 / 8, 0, 2 / 8, 1 / 8, 0]]


def test_intraclass_correlation() -> None:
    alike = torch.tensor([[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]])
    every = torch.ones(3, 2, dtype=torch.bool)
    over, under = intraclass(alike, every)
    assert over / under == pytest.approx(1)
    # one-way analysis of variance by hand: between 4 * 2 / 2, within (3 * 2 * 0.25) / 3
    values = torch.tensor([[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]])
    over, under = intraclass(values, every)
    assert over / under == pytest.approx((8 - 0.5) / (8 + 0.5))


def test_a_token_with_one_branch_says_nothing_about_its_others() -> None:
    assert intraclass(torch.rand(6, 1), torch.ones(6, 1, dtype=torch.bool)) == (0.0, 0.0)
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    values = torch.tensor([[1.0, 1.0], [2.0, 2.0], [9.0, -9.0]])
    assert intraclass(values, valid) == intraclass(values[:2], valid[:2])
