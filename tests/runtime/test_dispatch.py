"""What could leak from one step, stream, trajectory or model into another, tried end to end.

Two truths, both compared bit by bit (nothing is compiled here: `inner="eager"`): the same loop run by itself after a
reset, and for a call that has to be computed in full the model under the schedule `full`, which keeps no state.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, StateError
from moeca_compile.schedule import Action, Schedule
from tests.sampling import (
    NULL,
    TIMES,
    Loop,
    Taped,
    cfg_batched,
    cfg_calls,
    compiled,
    dit,
    heun,
    in_place,
    noise,
    plain,
    records,
    run,
    same,
    streams,
    take_turns,
    uncached,
    under_compile_lock,
)  # fmt: skip

CALM = r"moeca_compile\.trajectory"  # what the warnings about a lost trajectory name


# -- the plain way ----------------------------------------------------------------------------------------------------


def test_a_trajectory_forecasts_and_repeats_bit_by_bit(model: nn.Module, full: nn.Module) -> None:
    first, second = run(plain(model)), run(plain(model))
    assert same(first, second)
    assert [record.variant for record in records(model)] == ["v0", "v1", "v1"] * 3 + ["v0"]
    assert not any(record.cold for record in records(model))
    tape = Taped(model)
    run(plain(tape))
    assert tape.equals(full, calls=range(0, 10, 3))
    assert not any(tape.equals(full, calls=[i]) for i in (1, 2, 4, 5, 7, 8)), "a forecast that is exact shows nothing"


def test_a_sampler_may_overwrite_latent_and_output(model: nn.Module) -> None:
    truth = under_compile_lock(model, plain)
    assert same(run(in_place(model)), truth)


def test_the_schedule_full_is_the_model_itself(full: nn.Module) -> None:
    assert same(run(plain(full)), run(plain(full._orig_mod)))


# -- classifier-free guidance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [range(1000), range(4)], ids=["always", "switched off"])
def test_two_calls_a_step_are_two_streams(model: nn.Module, twin: nn.Module, guided: range) -> None:
    """The truth: each branch has a model of its own."""
    apart = run(cfg_calls(lambda x, t, y: (twin if y[0] == NULL else model)(x, t, y), guided=guided))
    moeca.reset(model)
    assert same(run(cfg_calls(model, guided=guided)), apart)


def test_a_branch_that_was_away_comes_back_cold(model: nn.Module, full: nn.Module) -> None:
    tape = Taped(model)
    run(cfg_calls(tape, guided=(0, 1, 2, 3, 5)))  # step 5 would be a forecast; calls 0..7, 8 (cond 4), 9 and 10
    assert tape.equals(full, calls=[10])
    assert not tape.equals(full, calls=[9])


def test_branches_may_change_their_order(model: nn.Module, twin: nn.Module) -> None:
    """They are told apart by their conditioning, not by who comes first."""
    tape = Taped(model)
    run(cfg_calls(tape))
    wanted = [out for step in range(10) for out in tape.outputs[2 * step : 2 * step + 2][:: -1 if step % 2 else 1]]
    inputs = [call for step in range(10) for call in tape.inputs[2 * step : 2 * step + 2][:: -1 if step % 2 else 1]]
    with torch.no_grad():
        assert same([twin(*call) for call in inputs], wanted)


def test_named_streams_give_what_the_clock_finds_out(model: nn.Module) -> None:
    found = run(cfg_calls(model))
    assert same(run(cfg_calls(model, enter=streams(model))), found)


@pytest.mark.slow
def test_a_batched_guidance_interval_starts_cold_at_both_ends(model: nn.Module, full: nn.Module) -> None:
    """Batch 1, batch 2, batch 1: the first state is still there at the end, and many steps too old."""
    tape = Taped(model)
    run(cfg_batched(tape, guided=range(3, 5)))
    assert tape.equals(full, calls=[3, 5])
    assert [record.step for record in records(model)] == list(range(10))
    assert [record.cold for record in records(model)] == [step == 5 for step in range(10)]  # 3 is a full one anyway


def test_a_named_stream_that_changes_its_batch_starts_cold_at_both_ends(model: nn.Module, full: nn.Module) -> None:
    tape = Taped(model)
    with moeca.trajectory(model, stream="both", steps=10):
        run(cfg_batched(tape, guided=range(2, 5)))
    assert tape.equals(full, calls=[2, 5])
    assert [record.step for record in records(model)] == list(range(10))


def test_branches_of_two_shapes_are_both_cached(model: nn.Module, twin: nn.Module) -> None:
    """As with prompts of two lengths: conditional and unconditional calls differ in their signature."""
    loops = [plain(model, seed=0), plain(model, seed=1, batch=3)]
    expected = [run(plain(model, seed=0)), run(plain(twin, seed=1, batch=3))]
    moeca.reset(model)
    for outputs, truth in zip(take_turns(loops), expected, strict=True):
        assert same(outputs, truth)


# -- starting and stopping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", range(1, 10))
def test_a_trajectory_after_one_that_stopped_early_is_its_own(model: nn.Module, calls: int) -> None:
    truth = under_compile_lock(model, lambda m: plain(m, seed=1))
    run(plain(model, seed=0), calls)
    assert same(run(plain(model, seed=1)), truth)


@pytest.mark.parametrize("first", [4, 5, 6])
@pytest.mark.parametrize("stop", [5, 10])
def test_a_trajectory_that_starts_in_the_middle_is_its_own(model: nn.Module, stop: int, first: int) -> None:
    """img2img, also at the very step where the last run stopped, and one further."""
    truth = under_compile_lock(model, lambda m: plain(m, seed=1, times=TIMES[first:]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{CALM}", category=MoecaWarning)
        run(plain(model, seed=0), stop)
        assert same(run(plain(model, seed=1, times=TIMES[first:])), truth)


def test_rising_timesteps_are_followed_too(model: nn.Module, twin: nn.Module) -> None:
    rising = TIMES[-2::-1]
    truth = run(plain(twin, times=rising))
    run(plain(model, seed=1))
    assert same(run(plain(model, times=rising)), truth)
    assert [record.variant for record in records(model)][:4] == ["v0", "v1", "v1", "v0"]


def test_a_heun_solver_is_exact_and_says_how_it_gets_fast(model: nn.Module, full: nn.Module, twin: nn.Module) -> None:
    tape = Taped(model)
    with pytest.warns(MoecaWarning, match="visited again.*stream="):
        run(heun(tape))
    first, second = [0, *range(1, 19, 2)], range(2, 19, 2)
    assert tape.equals(full, calls=second)
    assert tape.equals(twin, calls=first)  # the first visits are a trajectory of their own


def test_a_heun_solver_with_named_streams_forecasts_both_visits(model: nn.Module, twin: nn.Module) -> None:
    tape = Taped(model)
    run(heun(tape, enter=streams(model)))
    assert tape.equals(twin, calls=[0, *range(2, 19, 2)])
    moeca.reset(twin)
    assert tape.equals(twin, calls=range(1, 19, 2))


def test_a_timestep_that_is_not_a_number_is_computed_in_full(model: nn.Module, full: nn.Module) -> None:
    run(plain(model), 2)
    inputs = noise(0, 2), torch.tensor([500.0, math.nan]), torch.tensor([1, 2])
    with torch.no_grad(), pytest.warns(MoecaWarning, match="a timestep is NaN"):
        assert torch.equal(model(*inputs)[:1], full(*inputs)[:1])  # the other sample is NaN
    tape = Taped(model)
    run(plain(tape, times=TIMES[2:3]))
    assert tape.equals(full)  # nobody knows how many steps that call was


# -- taking turns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [0, 1, 4])
@pytest.mark.parametrize("loop", [plain, cfg_calls])
def test_interleaved_trajectories_are_cold_and_say_so(
    model: nn.Module, full: nn.Module, loop: Callable[..., Loop], lead: int
) -> None:
    """One with a lead over the other, so that they don't meet at a timestep."""
    tapes = [Taped(model), Taped(model)]
    loops = [loop(tape, seed=number) for number, tape in enumerate(tapes)]
    run(loops[0], lead)
    ahead = len(tapes[0].inputs)
    with pytest.warns(MoecaWarning, match=CALM):
        take_turns(loops)
    together = len(tapes[0].inputs) - ahead
    assert tapes[0].equals(full, calls=range(ahead + bool(ahead), together))
    assert tapes[1].equals(full, calls=range(together))


@pytest.mark.parametrize("turns", [(), (0, 0, 1, 0, 1, 1, 1, 0), (1,) * 5 + (0,) * 7])
@pytest.mark.parametrize("loop", [plain, cfg_calls])
def test_what_one_trajectory_computes_never_depends_on_another(
    model: nn.Module, loop: Callable[..., Loop], turns: tuple[int, ...]
) -> None:
    """Non-interference: whatever the clock decides, other latents in the second loop change nothing in the first."""
    outputs = []
    for seed in (1, 2):
        moeca.reset(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{CALM}", category=MoecaWarning)
            outputs.append(take_turns([loop(model, seed=0), loop(model, seed=seed)], turns))
    assert same(outputs[0][0], outputs[1][0])
    assert not same(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("turns", [(), (0, 0, 1, 0, 1, 1, 1, 0)])
@pytest.mark.parametrize("loop", [plain, cfg_calls, heun])
def test_interleaved_named_streams_are_exact_and_fast(
    model: nn.Module, loop: Callable[..., Loop], turns: tuple[int, ...]
) -> None:
    truths = [run(loop(model, seed=seed, enter=streams(model))) for seed in (0, 1)]
    outputs = take_turns([loop(model, seed=seed, enter=streams(model)) for seed in (0, 1)], turns)
    assert all(same(*pair) for pair in zip(outputs, truths, strict=True))
    assert {record.variant for record in records(model)} == {"v0", "v1"}
    assert not any(record.cold for record in records(model))


@pytest.mark.parametrize("loop", [plain, cfg_calls])
def test_interleaved_trajectories_without_a_stream_are_exact_and_fast(
    model: nn.Module, loop: Callable[..., Loop]
) -> None:
    truths = [under_compile_lock(model, lambda m, seed=seed: loop(m, seed=seed)) for seed in (0, 1)]
    opened = [moeca.trajectory(model), moeca.trajectory(model)]
    loops = [loop(model, seed=n, enter=lambda _, one=one: one) for n, one in enumerate(opened)]
    assert all(same(*pair) for pair in zip(take_turns(loops, (0, 1, 1, 0, 1)), truths, strict=True))


def test_calls_after_a_named_stream_are_not_counted_to_it(model: nn.Module) -> None:
    """Left, a trajectory is left: the next call outside follows the clock again."""
    truth = under_compile_lock(model, lambda m: plain(m, seed=1))
    with moeca.trajectory(model, stream="only"):
        run(plain(model, seed=0), 4)
    assert same(run(plain(model, seed=1)), truth)


def test_a_trajectory_around_the_loop_leaves_calls_outside_alone(model: nn.Module) -> None:
    truth = under_compile_lock(model, plain)
    outside = plain(model)
    first = run(outside, 4)
    with moeca.trajectory(model):
        run(plain(model, seed=1))
    assert same(first + run(outside), truth)


def test_more_calls_than_declared_are_refused(model: nn.Module) -> None:
    for stream in ("only", None):
        with moeca.trajectory(model, steps=3, stream=stream):
            loop = plain(model)
            run(loop, 3)
            with pytest.raises(StateError, match=r"steps=3.*call 4"):
                next(loop)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["numpy", pytest.param("dense", marks=pytest.mark.slow)])
def test_instances_of_one_class_that_take_turns_share_nothing(style: str) -> None:
    """They share one Dynamo callable, and their loops look alike."""
    models = [compiled(dit(seed, style)) for seed in range(2)]
    truths = [under_compile_lock(one, plain) for one in models]
    assert not same(*truths)
    for outputs, truth in zip(take_turns([plain(one) for one in models]), truths, strict=True):
        assert same(outputs, truth)
    assert [len(records(one)) for one in models] == [10, 10]


@pytest.mark.parametrize(
    "other",
    [pytest.param({"schedule": "uniform:2"}, marks=pytest.mark.slow), {}],
    ids=["other options", "same options"],
)
def test_one_model_compiled_twice_keeps_two_states(other: dict[str, object]) -> None:
    module = dit()
    models = [compiled(module), compiled(module, **other)]
    truths = [under_compile_lock(one, lambda m: plain(m, seed=7)) for one in models]
    assert same(*truths) == (not other)
    for outputs, truth in zip(take_turns([plain(one, seed=7) for one in models]), truths, strict=True):
        assert same(outputs, truth)


# -- the schedule's end, and values that break ------------------------------------------------------------------------


def closed(*letters: str) -> Schedule:
    return Schedule(tuple((Action(letter),) for letter in letters))


def test_steps_past_the_last_row_are_computed_in_full() -> None:
    module = dit()
    model, full, tape = compiled(module, schedule=closed("C", "F", "C", "F")), uncached(module), Taped(None)
    tape.model = model
    with pytest.warns(MoecaWarning, match="past the schedule's last row"):
        run(plain(tape))
    assert tape.equals(full, calls=[0, 2, *range(4, 10)])
    assert not tape.equals(full, calls=[3])


@pytest.fixture(params=[None, "only"], ids=["clock", "named"])
def within(request: pytest.FixtureRequest, model: nn.Module) -> Iterator[AbstractContextManager[object]]:
    return moeca.trajectory(model, stream="only") if request.param else warnings.catch_warnings()


def test_a_step_that_is_not_finite_is_forgotten(
    model: nn.Module, full: nn.Module, within: AbstractContextManager[object]
) -> None:
    broken = noise(0, 2)
    broken[0, 0, 0, 0] = float("nan")
    labels = torch.tensor([3, 3])
    with within:
        run(plain(model), 3)
        with torch.no_grad(), pytest.warns(MoecaWarning, match="finite|nan"):
            outputs = [model(x, torch.full((2,), t), labels) for x, t in ((broken, TIMES[3]), (noise(0, 2), TIMES[4]))]
    assert not outputs[0].isfinite().all()
    with torch.no_grad():
        assert torch.equal(outputs[1], full(noise(0, 2), torch.full((2,), TIMES[4]), labels))
