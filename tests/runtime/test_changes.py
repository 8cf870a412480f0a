"""What may change between two steps of a trajectory: weights, shapes, dtypes, autocast, modes. The next one is cold."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, StateError
from tests.sampling import (
    TIMES,
    Enter,
    Taped,
    compiled,
    dit,
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

COLD = 4  # the step after four calls: its row is a forecast, so only a cold start makes it exact


@pytest.fixture(params=["clock", "trajectory", "stream"])
def enter(request: pytest.FixtureRequest) -> Callable[[nn.Module], Enter]:
    """How a loop says where it belongs: not at all, by a trajectory, by a named stream."""

    def made(model: nn.Module) -> Enter:
        if request.param == "stream":
            return streams(model)
        one = moeca.trajectory(model) if request.param == "trajectory" else nullcontext()
        return lambda stream: one

    return made


# -- weights ----------------------------------------------------------------------------------------------------------


def load(module: nn.Module) -> None:
    module.load_state_dict({name: value.flip(0) for name, value in module.state_dict().items()})


def copy_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.out.weight.copy_(module.out.weight.flip(0))


def add_in_place(module: nn.Module) -> None:
    """As adapters do that are merged into the weights."""
    with torch.no_grad():
        module.blocks[0].moe.experts[1].down_proj.weight += 0.1


def swap_data(module: nn.Module) -> None:
    module.blocks[0].qkv.weight.data = module.blocks[0].qkv.weight.flip(0)


def replace(module: nn.Module) -> None:
    router = module.blocks[0].moe.router
    router.weight = nn.Parameter(router.weight.flip(0), requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        load,
        pytest.param(copy_in_place, marks=pytest.mark.slow),
        add_in_place,
        pytest.param(swap_data, marks=pytest.mark.slow),
        replace,
    ],
)
def test_changed_weights_start_cold(
    change: Callable[[nn.Module], None], model: nn.Module, full: nn.Module, enter: Callable[[nn.Module], Enter]
) -> None:
    tape = Taped(model)
    loop = plain(tape, enter=enter(model))
    run(loop, COLD)
    change(model._orig_mod)
    run(loop, 1)
    assert tape.equals(full, calls=[COLD])
    torch.testing.assert_close(tape.outputs[COLD], model._orig_mod(*tape.inputs[COLD]))


@pytest.mark.slow
def test_changed_buffers_start_cold() -> None:
    module = dit(style="nonzero")
    model, full = compiled(module), uncached(module)
    tape = Taped(model)
    loop = plain(tape)
    run(loop, COLD)
    bias = module.blocks[0].moe.selection_bias
    bias.copy_(bias.flip(0))
    run(loop, 1)
    assert tape.equals(full, calls=[COLD])


def test_weights_of_inference_mode_are_survived() -> None:
    with torch.inference_mode():
        model = compiled(dit())
        assert same(run(plain(model)), run(plain(model)))


def test_a_model_that_is_gone_takes_its_state_along() -> None:
    module = dit()
    model = compiled(module)
    run(plain(model))
    gone = weakref.ref(module.out.weight)
    del module, model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_size_is_another_image(model: nn.Module, full: nn.Module) -> None:
    """Stopped, and gone on with in another size from a later timestep."""
    run(plain(model), COLD)
    tape = Taped(model)
    later = run(plain(tape, times=TIMES[COLD:], size=(4, 16)))
    assert tape.equals(full, calls=[0, 3])
    assert same(under_compile_lock(model, lambda m: plain(m, times=TIMES[COLD:], size=(4, 16))), later)


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_another_batch_goes_on_with_the_trajectory(
    model: nn.Module, full: nn.Module, enter: Callable[[nn.Module], Enter], batch: int
) -> None:
    """The step and its row go on; the new batch has no state, so its first call is computed in full."""
    opened = enter(model)
    run(plain(model, enter=opened), COLD)
    tape = Taped(model)
    run(plain(tape, times=TIMES[COLD:], batch=batch, enter=opened))
    assert tape.equals(full, calls=[0, 2, 5])
    assert [record.step for record in records(model)] == list(range(len(TIMES)))
    assert [record.cold for record in records(model)] == [step == COLD for step in range(len(TIMES))]
    by_hand = sum(record.macs for record in records(model)) / sum(record.full_macs for record in records(model))
    assert moeca.stats(model).mac_fraction == pytest.approx(by_hand)


@pytest.mark.slow
def test_trajectories_of_two_shapes_that_take_turns_are_both_exact_or_cold(model: nn.Module, full: nn.Module) -> None:
    """Out of step, each misses steps of the other: the clock can't know that they are two, and says so."""
    tapes = [Taped(model), Taped(model)]
    loops = [plain(tapes[0]), plain(tapes[1], seed=1, batch=3)]
    run(loops[0], COLD)
    with pytest.warns(MoecaWarning, match=r"the latent changed.*moeca_compile\.trajectory"):
        take_turns(loops)
    assert tapes[0].equals(full, calls=range(COLD + 1, 10))
    assert tapes[1].equals(full, calls=range(COLD + 1))


@pytest.mark.slow
def test_other_strides_are_exact(model: nn.Module, full: nn.Module) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = [lambda x, t, y, layout=layout, m=m: m(x.contiguous(memory_format=layout), t, y) for m in (model, full)]
        tape = Taped(laid[0])
        run(plain(tape, times=TIMES[:3]))
        assert tape.equals(laid[1], calls=[0])  # a processor's kernels for the two layouts may round apart


@pytest.mark.slow
def test_another_dtype_of_the_whole_model_starts_cold(model: nn.Module, full: nn.Module) -> None:
    run(plain(model), COLD)
    tape = Taped(model)
    model._orig_mod.to(torch.bfloat16)
    try:
        outputs = run(plain(tape, times=TIMES[COLD:], dtype=torch.bfloat16))
        assert {out.dtype for out in outputs} == {torch.bfloat16}
        assert tape.equals(full, calls=[0, 2])
    finally:
        model._orig_mod.to(torch.float32)


@pytest.mark.parametrize("first", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.slow
def test_autocast_on_or_off_starts_cold(model: nn.Module, full: nn.Module, first: bool) -> None:
    tape = Taped(model)
    loop = plain(tape)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
        run(loop, COLD)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first):
        run(loop, 1)
        assert tape.equals(full, calls=[COLD])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
        assert not tape.equals(full, calls=[COLD])


def test_autocast_is_what_eager_makes_of_it(full: nn.Module) -> None:
    inputs = noise(0, 2), torch.full((2,), 500.0), torch.tensor([1, 2])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out, eager = full(*inputs), full._orig_mod(*inputs)
    assert out.dtype == eager.dtype
    torch.testing.assert_close(out, eager, atol=0.05, rtol=0.05)


class Island(nn.Module):
    """A model with a part that must not be cast."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = dit(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = self.inner(x, t, y)
        with torch.autocast("cpu", enabled=False):
            return self.head(out.float())


def test_a_part_without_autocast_stays_without() -> None:
    """The casts are in the graph; the autocast around the call must not come on top."""
    module = Island().eval().requires_grad_(False)
    full = uncached(module)
    inputs = noise(0, 2), torch.full((2,), 500.0), torch.tensor([1, 2])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert full(*inputs).dtype == torch.float32 == module(*inputs).dtype
        assert moeca.warmup(full, *inputs).dtype == torch.float32


# -- modes ------------------------------------------------------------------------------------------------------------


def test_inference_mode_changes_nothing(model: nn.Module, enter: Callable[[nn.Module], Enter]) -> None:
    """Dynamo has a graph of its own for tensors that were made in it; it computes the same."""
    truth = under_compile_lock(model, plain)
    with torch.inference_mode():
        assert same(run(plain(model)), truth)
    loop = plain(model, enter=enter(model))
    outputs = run(loop, COLD)
    with torch.inference_mode():
        outputs += run(loop, 2)
    assert same(outputs + run(loop), truth)
    assert not any(record.cold for record in records(model))


def test_grad_mode_is_refused_where_weights_or_inputs_want_gradients() -> None:
    module = dit()
    model = compiled(module)
    inputs = noise(0, 2), torch.full((2,), 500.0), torch.tensor([1, 2])
    module.out.weight.requires_grad_(True)
    with pytest.raises(StateError, match=r"torch\.no_grad\(\)"):
        model(*inputs)
    module.requires_grad_(False)
    with pytest.raises(StateError, match=r"torch\.inference_mode\(\)"):
        model(noise(0, 2).requires_grad_(), *inputs[1:])
    model(*inputs)  # nothing here wants gradients


def test_reset_in_the_middle_starts_cold(
    model: nn.Module, full: nn.Module, enter: Callable[[nn.Module], Enter]
) -> None:
    tape = Taped(model)
    loop = plain(tape, enter=enter(model))
    run(loop, COLD)
    assert moeca.stats(model).state_bytes > 0
    moeca.reset(model)
    assert moeca.stats(model).state_bytes == 0
    run(loop, 1)
    assert tape.equals(full, calls=[COLD])
    assert [record.step for record in records(model)] == [0]


def test_calls_that_belong_to_no_step_leave_the_trajectory_its_stream(model: nn.Module) -> None:
    """Their conditioning isn't kept, so it doesn't push out that of the trajectory."""
    x, y = torch.randn(2, 4, 8, 8), torch.full((2,), 3)

    def others() -> None:
        for number in range(13):
            model(x, torch.tensor([5.0, float("nan")]), torch.tensor([number % 10, number // 10]))

    with torch.no_grad(), moeca.trajectory(model):
        for step in range(9):
            model(x, torch.full((2,), 1000.0 - 80 * step), y)
            if step == 3:
                with pytest.warns(MoecaWarning, match="a timestep is NaN"):
                    others()
    placed = [record for record in records(model) if record.timestep is not None]
    assert [record.stream for record in placed] == ["0"] * 9
    assert [record.step for record in placed if record.cold] == [4]
