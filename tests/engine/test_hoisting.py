"""Compiled models with what doesn't depend on the latent hoisted out of their variants: the same results, sooner."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.engine.hoisted import TimestepHistory
from moeca_compile.engine.program import Program
from moeca_compile.engine.prologues import Prologues
from moeca_compile.errors import MoecaWarning, StateError
from moeca_compile.frontend.handles import states_of
from tests.sampling import (
    TIMES,
    Loop,
    Model,
    cfg_batched,
    cfg_calls,
    compiled,
    dit,
    heun,
    in_place,
    plain,
    run,
    same,
    streams,
)  # fmt: skip
from tests.tools import UNHOISTED

BITWISE: dict[str, Callable[[Any], Loop]] = {
    "one call a step": plain,
    "guidance in one call": cfg_batched,
    "guidance in two calls": cfg_calls,
    "guidance in two named streams": lambda model: cfg_calls(model, enter=streams(model)),
    "guidance in some steps": lambda model: cfg_batched(model, guided=range(3, 7)),
    "a timestep visited twice": lambda model: heun(model, enter=streams(model)),
    "a sampler that writes into what it gets": in_place,
    "a timestep for each sample": lambda model: mixed_timesteps(model),
}


def mixed_timesteps(model: Model) -> Loop:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in TIMES[:4]:
        with torch.no_grad():
            yield model(x, torch.tensor([t, t / 2]), torch.tensor([1, 2]))


def program_of(model: nn.Module) -> Program:
    (state,) = states_of(model)
    runtime = state.runtime
    (program,) = runtime.programs.values()
    return program


def timestep_history_of(model: nn.Module) -> TimestepHistory:
    (state,) = states_of(model)
    runtime = state.runtime
    return runtime.trajectories.timestep_history


def mapped(model: nn.Module) -> list[int]:
    """Lets an eager model compute steps together, as compiled ones do; how many at a time."""
    run(plain(model), 1)
    moeca.reset(model)
    program, counts = program_of(model), list[int]()
    program.prologues.by_step = False
    timestep_history_of(model).last = ()
    over_steps = program.prologues.over_steps

    def watched(gives: tuple[int, ...]) -> Any:
        variant, at_once = over_steps(gives)
        at = variant.takes.index(program.timestep)
        return variant, lambda given: (counts.append(given[at].shape[0]), at_once(given))[1]

    program.prologues.over_steps = watched
    return counts


@functools.cache
def lean_and_whole() -> tuple[nn.Module, nn.Module]:
    return compiled(dit()), compiled(dit(), disable=UNHOISTED)


@pytest.mark.filterwarnings("ignore:the timesteps differ", "ignore:the latent changed")
@pytest.mark.parametrize("case", BITWISE)
def test_the_results_are_bitwise_those_of_whole_programs(case: str) -> None:
    lean, whole = lean_and_whole()
    for model in (lean, whole):
        moeca.reset(model)
    loop = BITWISE[case]
    for _ in range(2):
        assert same(run(loop(lean)), run(loop(whole)))


@pytest.mark.slow
def test_a_weight_written_past_its_version_counter_is_seen_by_the_next_trajectory() -> None:
    module = dit()
    model = compiled(module)
    run(plain(model))
    for weight in module.parameters():
        weight.data.mul_(1.5)
    assert same(run(plain(model)), run(plain(compiled(module, disable=UNHOISTED))))


def test_the_second_trajectory_computes_its_steps_together() -> None:
    model = compiled(dit())
    counts = mapped(model)
    first = run(plain(model))
    assert counts == []
    kept = moeca.stats(model).hoisted_bytes
    second = run(plain(model))
    assert counts == [len(TIMES)]
    assert moeca.stats(model).hoisted_bytes == len(TIMES) * kept
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_other_timesteps_are_learned_anew() -> None:
    model = compiled(dit())
    counts = mapped(model)
    truth = run(plain(compiled(dit()), times=TIMES[::3]))
    for times, known in ((TIMES, None), (TIMES, 10), (TIMES[:1] + TIMES[2::3], 10), (TIMES[:1] + TIMES[2::3], None)):
        run(plain(model, times=times))
        assert counts[-1:] == [known] * (known is not None) or known is None
    shorter = run(plain(model, times=TIMES[::3]))
    for one, other in zip(shorter, truth, strict=True):
        torch.testing.assert_close(one, other)


def test_declared_timesteps_are_computed_together_in_the_first_trajectory() -> None:
    model = compiled(dit())
    counts = mapped(model)
    for stream in (None, "cond"):
        with moeca.trajectory(model, stream=stream, timesteps=TIMES):
            run(plain(model))
    assert counts == [len(TIMES)] * 2


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tensors were on an accelerator, which nobody waits for."""
    for name in ("step", "hoisted"):
        monkeypatch.setattr(f"moeca_compile.engine.{name}.needs_device_sync", lambda value: True)


@pytest.mark.usefixtures("far")
@pytest.mark.slow
def test_timesteps_on_an_accelerator_are_taken_at_their_word() -> None:
    model, by_step = compiled(dit()), compiled(dit())
    counts = mapped(model)
    for times, stream, steps in ((TIMES, None, None), ((), "a", None), (TIMES, "a", 2 * len(TIMES))):
        with moeca.trajectory(by_step, steps, stream, timesteps=times):
            truth = run(plain(by_step))
    with moeca.trajectory(model, len(TIMES), "a", timesteps=TIMES):
        found = run(plain(model))
    assert counts == [len(TIMES)]
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("far")
def test_a_wrong_word_is_an_error() -> None:
    model = compiled(dit())
    wrong = [*TIMES[:3], TIMES[3] - 1, *TIMES[4:]]
    told = moeca.trajectory(model, stream="a", timesteps=wrong)
    with pytest.raises(StateError, match=f"call 4 came with timestep {TIMES[3]:g}, but the trajectory declared"), told:
        run(plain(model))


def test_an_operator_that_can_not_be_mapped_is_told_once_and_computed_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = compiled(dit())
    counts = mapped(model)
    run(plain(model))

    def refuse(*args: Any, **keywords: Any) -> Any:
        raise RuntimeError("vmap: no batching rule for it")

    monkeypatch.setattr(torch.fx.Interpreter, "run", refuse)
    variant, at_once = program_of(model).prologues.over_steps((0,))
    with pytest.raises(moeca.MoecaError, match="can't be computed for many timesteps at once: vmap: no batching rule"):
        at_once([torch.ones(2, *one.shape) if i == 0 else one for i, one in enumerate(_inputs(model, variant))])
    monkeypatch.undo()
    with pytest.warns(MoecaWarning, match="computed at each step, which is slower"):
        program_of(model).prologues.give_up_steps(moeca.MoecaError("x"))
    assert len(counts) == 1
    assert Prologues.over_steps(program_of(model).prologues, (0,)) is None


def _inputs(model: nn.Module, variant: Any) -> list[torch.Tensor]:
    known = dict(model._orig_mod.named_parameters())
    labels = [program_of(model).analysis.facts.inputs[i].label for i in variant.takes]
    own = {"t": torch.tensor([1.0]), "y": torch.tensor([1])}
    return [own.get(label, known.get(label, torch.ones(1))) for label in labels]


@pytest.mark.slow
def test_compiled_programs_share_their_values_too() -> None:
    module = dit()
    model, whole = compiled(module, inner="inductor"), compiled(module)
    truth = run(plain(whole))
    for _ in range(2):
        for one, other in zip(run(plain(model)), truth, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert "prologue0" in moeca.stats(model).compile_seconds
    assert set(program_of(model).prologues._mapped) == {(0,)}
