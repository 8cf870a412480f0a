"""Values that are kept within a trajectory: when they are computed again, and when for many steps at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_compile.engine import hoisted
from moeca_compile.engine.hoisted import Hoisted, TimestepPlan
from moeca_compile.engine.trajectories.timesteps import VariedTimesteps, uniform_timesteps
from moeca_compile.errors import LoweringError
from moeca_compile.graph.regions import HoistedValue
from moeca_compile.graph.variant import Variant

# arguments of a call: latent, timestep, prompt
STEP, FIXED = 0, 1  # positions among the hoisted values


@dataclass
class Program:
    """One value of the timestep and the prompt's (t * sum), one of the prompt alone (its sum), and what was run."""

    hoisted = (HoistedValue("a", "step", 8), HoistedValue("b", "invariant", 8))
    timesteps = (1,)
    condition = (2,)
    of_step = (STEP,)
    step_bytes = 8
    by_step = False
    freed = None
    maps: bool = True
    fails: bool = False
    ran: list[Any] = field(default_factory=list)
    given_up: list[LoweringError] = field(default_factory=list)
    ready: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def prologue(self, gives: tuple[int, ...], args: Sequence[Any]) -> tuple[Variant, Any]:
        self.ran.append(gives)
        if gives == (FIXED,):
            return _variant(takes=(2,)), lambda given: [given[0].sum().reshape(1)]
        return _variant(takes=(1,), hoists=(FIXED,)), lambda given: [given[0] * given[1]]

    def over_steps(self, gives: tuple[int, ...]) -> tuple[Variant, Any] | None:
        if not self.maps:
            return None

        def run(given: Sequence[Tensor]) -> list[Tensor]:
            self.ran.append(given[0].shape[0])
            if self.fails:
                raise LoweringError("no")
            return [given[0] * given[1]]

        return _variant(takes=(1,), hoists=(FIXED,)), run

    def give_up_steps(self, error: LoweringError) -> None:
        self.given_up.append(error)
        self.maps = False


def _variant(takes: tuple[int, ...], hoists: tuple[int, ...] = ()) -> Variant:
    return Variant("prologue", (), None, takes, (), (), False, False, outputs=1, hoists=hoists)


def keeping(plan: tuple[float, ...] = ()) -> Hoisted:
    """Values of a trajectory whose timesteps are known to be these."""
    return Hoisted(TimestepPlan(plan), number=lambda tensor: tuple(tensor.tolist()))


def call(kept: Hoisted, program: Program, t: float, prompt: Tensor, wanted: Sequence[int] = (STEP, FIXED)) -> bool:
    """Whether the values are right; `t` reaches the host."""
    contents = {2: tuple(prompt.tolist())}
    found = kept.of(program, tuple(wanted), (torch.zeros(1), torch.full((2,), t), prompt), t, contents)
    truth = {STEP: prompt.sum() * torch.full((2,), t), FIXED: prompt.sum().reshape(1)}
    return all(torch.equal(one, truth[position]) for one, position in zip(found, wanted, strict=True))


def test_what_the_timestep_does_not_touch_is_computed_once() -> None:
    program, kept, prompt = Program(), keeping(), torch.randn(3)
    assert all(call(kept, program, t, prompt) for t in (3.0, 2.0, 1.0))
    assert program.ran == [(FIXED,), (STEP,), (STEP,), (STEP,)]


def test_a_timestep_that_is_visited_twice_in_a_row_is_computed_once() -> None:
    program, kept, prompt = Program(), keeping(), torch.randn(3)
    assert all(call(kept, program, t, prompt) for t in (3.0, 3.0, 2.0, 2.0))
    assert program.ran.count((STEP,)) == 2


def test_known_timesteps_are_computed_together() -> None:
    program, kept, prompt = Program(), keeping((4.0, 3.0, 2.0, 1.0)), torch.randn(3)
    assert all(call(kept, program, t, prompt) for t in (3.0, 2.0, 1.0))
    assert program.ran == [(FIXED,), 3]
    assert kept.bytes == 4 + 3 * 8


def test_a_timestep_that_was_not_known_is_computed_by_itself() -> None:
    program, kept, prompt = Program(), keeping((4.0, 3.0)), torch.randn(3)
    assert all(call(kept, program, t, prompt) for t in (4.0, 3.5, 3.0))
    assert program.ran == [(FIXED,), 2, (STEP,)]


def test_the_table_is_bounded_and_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hoisted, "TABLE_BYTES", 2 * 8)
    program, kept, prompt = Program(), keeping((5.0, 4.0, 3.0, 2.0, 1.0)), torch.randn(3)
    assert all(call(kept, program, t, prompt) for t in (5.0, 4.0, 3.0, 2.0, 1.0))
    assert program.ran == [(FIXED,), 2, 2, (STEP,)]


def test_a_prompt_that_changed_is_seen() -> None:
    program, kept, prompt = Program(), keeping((3.0, 2.0, 1.0)), torch.randn(3)
    assert call(kept, program, 3.0, prompt)
    assert call(kept, program, 2.0, prompt + 1)
    assert program.ran == [(FIXED,), 3, (FIXED,), 2]


def test_an_equal_prompt_in_another_tensor_is_the_same() -> None:
    program, kept, prompt = Program(), keeping((3.0, 2.0)), torch.randn(3)
    assert call(kept, program, 3.0, prompt)
    assert call(kept, program, 2.0, prompt.clone())
    assert program.ran == [(FIXED,), 2]


def weighted(program: Program, weight: Tensor) -> list[Any]:
    """A call's arguments, the last a weight that comes into the value of the prompt."""
    plain = program.prologue

    def prologue(gives: tuple[int, ...], args: Sequence[Any]) -> tuple[Variant, Any]:
        if gives == (FIXED,):
            return _variant(takes=(2, 3)), lambda given: [given[0].sum().reshape(1) * given[1].sum()]
        return plain(gives, args)

    program.prologue = prologue  # type: ignore[method-assign]
    return [torch.zeros(1), torch.tensor([1.0]), torch.ones(3), weight]


def test_a_weight_that_was_written_to_is_found_where_somebody_looks() -> None:
    program, kept, weight = Program(), keeping(), torch.ones(2)
    args = weighted(program, weight)
    first = kept.of(program, (FIXED,), args, 1.0, {2: 0})
    assert not kept.weights_changed(args)
    weight.data.mul_(2)
    assert kept.of(program, (FIXED,), args, 1.0, {2: 0})[0] is first[0]
    assert kept.weights_changed(args)
    assert torch.equal(kept.of(program, (FIXED,), args, 1.0, {2: 0})[0], torch.tensor([12.0]))
    assert not kept.weights_changed(args)


def test_an_input_that_changes_at_every_step_is_not_copied_for_ever() -> None:
    program, kept = Program(), keeping((6.0, 5.0, 4.0, 3.0, 2.0, 1.0))
    assert all(call(kept, program, t, torch.randn(3)) for t in (6.0, 5.0, 4.0, 3.0, 2.0, 1.0))
    assert kept.inputs == kept.weights == {}
    assert program.ran[-4:] == [(FIXED,), (STEP,)] * 2


def test_where_steps_can_not_be_mapped_each_is_computed_by_itself() -> None:
    program, kept, prompt = Program(fails=True), keeping((3.0, 2.0)), torch.randn(3)
    assert call(kept, program, 3.0, prompt)
    assert call(kept, program, 2.0, prompt)
    assert len(program.given_up) == 1
    assert program.ran == [(FIXED,), 2, (STEP,), (STEP,)]


def test_without_a_timestep_on_the_host_nothing_of_a_step_is_kept() -> None:
    program, kept, args = Program(), keeping((3.0, 2.0)), (torch.zeros(1), torch.tensor([3.0]), torch.ones(3))
    for _ in range(2):
        assert torch.equal(kept.of(program, (STEP,), args, None)[0], torch.tensor([9.0]))
    assert program.ran == [(STEP,), (FIXED,), (STEP,)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(3.0), 3.0), (torch.tensor([7, 7]), 7.0), (torch.tensor([1.0, 2.0]), None), (None, None),
        (torch.tensor([float("nan")]), None), (torch.empty(0), None), (2.0, None),
    ],
)  # fmt: skip
def test_the_timestep_of_a_call(value: Any, expected: float | None) -> None:
    assert uniform_timesteps([value]) == expected


def test_contents_of_several_timesteps_are_never_expected() -> None:
    plan = TimestepPlan()
    plan.visit(VariedTimesteps((1,)))
    assert plan.visited == []
    assert plan.history.last == ()


def test_what_lies_ahead() -> None:
    plan = TimestepPlan((3.0, 2.0, 1.0))
    assert plan.after(2.0) == (2.0, 1.0)
    assert plan.after(2.5) == ()
    for timestep in (3.0, 3.0, 2.0):
        plan.visit(timestep)
    assert plan.visited == [3.0, 2.0]
