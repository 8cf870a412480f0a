"""Whole trajectories looked at: against the model's own modules by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.drift.branches import BranchWatch, branch_drift, information
from moeca_compile.planner.drift.ratios import Ratios
from moeca_compile.planner.rollout import Call, SampledModel
from tests import toy

STEPS, TOKENS = 8, 4


def guided(model: Any, seed: int) -> Tensor:
    """Two calls a step."""
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        t = torch.full((3,), 1000.0 * (1 - step / STEPS))
        cond, uncond = model(x, t, torch.tensor([1, 2, 3])), model(x, t, torch.full((3,), 10))
        x = x - (uncond + 1.5 * (cond - uncond)) / STEPS
    return x


def by_hand(layer: int, sampler: Any = toy.sample) -> list[tuple[Tensor, Tensor]]:
    """Of every call of one MoE layer its ids [T, K] and output [T, D]."""
    seen: list[tuple[Tensor, Tensor]] = []
    model = toy.model().eval()

    def look(moe: Any, args: Any, output: Tensor) -> None:
        ids, _ = moe.route(args[0].reshape(-1, args[0].shape[-1]))
        seen.append((ids, output.reshape(-1, output.shape[-1])))

    model.blocks[layer].moe.register_forward_hook(look)
    with torch.no_grad():
        sampler(model, 0)
    return seen


def changed(now: Tensor, then: Tensor) -> float:
    """Share of ids that weren't there."""
    return 1 - (now.unsqueeze(2) == then.unsqueeze(1)).any(2).double().mean().item()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return branch_drift(toy.model().eval(), toy.sample)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_is_seen_as_its_module_is(found: dict[str, Any], layer: int) -> None:
    one, seen = found["regions"][f"blocks.{layer}.moe"], by_hand(layer)
    assert (one["kind"], one["layer"], found["steps"]) == ("experts", layer, STEPS)
    pairs = list(zip(seen[1:], seen, strict=False))
    transitions = [changed(now, then) for (now, _), (then, _) in pairs]
    assert one["by_step"]["transitions"][1:] == pytest.approx(transitions)
    assert np.isnan(one["by_step"]["transitions"][0])
    assert one["overall"]["transitions"] == pytest.approx(np.mean(transitions))
    moved = [((now - then).square().sum().item(), now.square().sum().item()) for (_, now), (_, then) in pairs]
    assert one["by_step"]["reuse"][1:] == pytest.approx([(over / under) ** 0.5 for over, under in moved], rel=1e-4)
    assert one["overall"]["reuse"] == pytest.approx(
        (sum(o for o, _ in moved) / sum(u for _, u in moved)) ** 0.5, rel=1e-4
    )
    counts = torch.stack([ids.flatten().bincount(minlength=4) for ids, _ in seen]).double()
    loads = np.array(one["by_expert"]["load by step"])
    np.testing.assert_allclose(loads, (counts / counts.sum(1, keepdim=True)).T.numpy())
    assert np.shape(one["by_position"]["load"]) == (4, TOKENS)
    assert np.sum(one["by_position"]["load"]) == pytest.approx(1)
    assert len(one["by_position"]["reuse"]) == TOKENS


def test_what_is_no_moe_layer_is_looked_at_as_a_whole(found: dict[str, Any]) -> None:
    kinds = {one["kind"]: one for one in found["regions"].values()}
    assert set(kinds) == {"attention", "experts"}
    assert set(kinds["attention"]["overall"]) == {"reuse", "forecast", "worst 10%", "worst 25%"}
    assert "by_expert" not in kinds["attention"]


def test_branches_forecast_by_themselves_err_less_than_their_sum(found: dict[str, Any]) -> None:
    for key in ("blocks.0.moe", "blocks.1.moe"):
        overall = found["regions"][key]["overall"]
        assert overall["branch forecast"] < overall["sum forecast"]


@pytest.mark.slow
def test_a_wider_gap() -> None:
    one = branch_drift(toy.model().eval(), toy.sample, gap=2)["regions"]["blocks.1.moe"]
    seen = [ids for ids, _ in by_hand(1)]
    expected = [changed(now, then) for now, then in zip(seen[2:], seen, strict=False)]
    assert one["by_step"]["transitions"][2:] == pytest.approx(expected)
    assert np.isnan(one["by_step"]["forecast"][3])
    assert not np.isnan(one["by_step"]["forecast"][4])


@pytest.mark.slow
def test_streams_are_compared_with_themselves() -> None:
    one = branch_drift(toy.model().eval(), guided)["regions"]["blocks.0.moe"]
    seen = [ids for ids, _ in by_hand(0, guided)]
    for step in range(1, STEPS):
        pairs = ((seen[2 * step + stream], seen[2 * step - 2 + stream]) for stream in (0, 1))
        expected = np.mean([changed(now, then) for now, then in pairs])
        assert one["by_step"]["transitions"][step] == pytest.approx(expected)


@pytest.mark.slow
def test_seeds_are_trajectories_of_their_own() -> None:
    """The same seed twice, by a sampler that ignores it: the same numbers, for nothing is compared across seeds."""
    once, twice = (
        branch_drift(toy.model().eval(), lambda model, seed: toy.sample(model, 0), seeds) for seeds in ((0,), (0, 1))
    )
    for key, one in once["regions"].items():
        np.testing.assert_allclose(list(twice["regions"][key]["overall"].values()), list(one["overall"].values()))


@pytest.mark.parametrize("gap", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_only_the_last_steps_are_held(gap: int) -> None:
    sampled = SampledModel(toy.model().eval(), toy.sample, "region", "eager")
    watches: list[BranchWatch] = []
    held: list[int] = []

    def see(call: Call) -> None:
        if not watches:
            watches.append(BranchWatch(call.program, gap))
        watches[0].observe(call)
        held.extend(len(steps) for steps in watches[0]._last.values())

    sampled.run(0, watch=see)
    assert max(held) == 2 * gap


def test_information() -> None:
    assert information(np.full((3, 4), 1 / 12)) == pytest.approx(0)
    assert information(np.eye(4)) == pytest.approx(2)
    assert information(np.array([[1.0, 0.0], [np.nan, np.nan]])) == 0


def test_ratios_grow_and_what_was_never_seen_is_nan() -> None:
    ratios = Ratios()
    ratios.add("load", "a", 2, torch.tensor([1.0, 0.0]), torch.tensor([2, 0]))
    ratios.add("load", "a", 2, [2, 0], [2, 0])
    ratios.add("load", "a", 0, [0, 1], [1, 1])
    assert ratios.of("a") == ["load"]
    np.testing.assert_equal(ratios.by_step("load", "a", 3), [[0, 1], [np.nan, np.nan], [0.75, np.nan]])
    np.testing.assert_equal(ratios.over_all("load", "a"), [0.6, 1])


def test_bad_input() -> None:
    model = toy.model().eval()
    with pytest.raises(ScheduleError, match=r"seeds=\(\), gap=1: at least one seed"):
        branch_drift(model, toy.sample, seeds=())
    with pytest.raises(ScheduleError, match="gap=0: at least one seed and a gap of 1 or more"):
        branch_drift(model, toy.sample, gap=0)
    with pytest.raises(ScheduleError, match="the trajectory has 8 steps; forecasts over a gap of 4 need 9"):
        branch_drift(model, toy.sample, gap=4)
