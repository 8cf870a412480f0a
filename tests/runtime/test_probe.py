"""What a call shows: one timestep or none, which conditioning it has, the change of the latent."""

from __future__ import annotations

import math
from collections.abc import Hashable

import pytest
import torch
from torch import Tensor

from moeca_compile.engine import probe as probe_file
from moeca_compile.engine.probe import Probe
from moeca_compile.runtime.clock import CallObservation


def condition_of(probe: Probe, *tensors: object) -> Hashable:
    return probe.observe(torch.tensor([1.0]), None, tensors).condition


# -- the conditioning of a call ---------------------------------------------------------------------------------------


@pytest.fixture(params=["host", "accelerator"], autouse=True)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator everything is compared on the device and read at once; here its tensors are the host's."""
    if request.param == "accelerator":
        monkeypatch.setattr(probe_file, "needs_device_sync", lambda value: isinstance(value, Tensor))


def test_a_change_in_place_is_seen() -> None:
    probe, prompt = Probe(), torch.zeros(3)
    before = condition_of(probe, prompt)
    prompt[1] = 1
    assert condition_of(probe, prompt) != before
    prompt[1] = 0
    assert condition_of(probe, prompt) == before


def test_a_change_in_place_of_an_inference_tensor_is_seen() -> None:
    with torch.inference_mode():
        probe, prompt = Probe(), torch.zeros(3)
        before = condition_of(probe, prompt)
        prompt[1] = 1
        assert condition_of(probe, prompt) != before


def test_a_change_past_the_version_counter_is_seen() -> None:
    probe, prompt = Probe(), torch.zeros(70000)
    before = condition_of(probe, prompt)
    prompt.data[69999] = 1
    assert condition_of(probe, prompt) != before
    prompt.numpy()[69999] = 0
    assert condition_of(probe, prompt) == before


def test_two_equal_inputs_are_one_content_at_every_call() -> None:
    probe = Probe()
    assert condition_of(probe, torch.ones(3), torch.ones(3)) == condition_of(probe, torch.ones(3), torch.ones(3))


def test_a_new_tensor_at_an_old_address_is_read_afresh() -> None:
    probe = Probe()
    assert len({condition_of(probe, torch.full((2,), value)) for value in range(100)}) == 100


def test_numbers_beside_tensors_count() -> None:
    probe = Probe()
    assert condition_of(probe, 7.5) != condition_of(probe, 1.0)


def test_inputs_keep_their_places() -> None:
    probe, a, b = Probe(), torch.tensor([1]), torch.tensor([2])
    assert condition_of(probe, a, b) != condition_of(probe, b, a)


# -- the timestep -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 1)])
def test_one_timestep_in_any_form_is_read(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert Probe().observe(torch.full(shape, 248, dtype=dtype), None, ()).timestep == 248.0


def test_timesteps_that_differ_in_the_last_bit_differ() -> None:
    times = [0.1, math.nextafter(0.1, 1.0)]
    seen = [Probe().observe(torch.tensor([t], dtype=torch.float64), None, ()).timestep for t in times]
    assert seen == times


@pytest.mark.parametrize("rows", [[math.nan, math.nan], [1.0, math.nan]])
def test_a_timestep_that_is_not_a_number_is_trouble(rows: list[float]) -> None:
    observation = Probe().observe(torch.tensor(rows), None, ())
    assert observation.timestep is None
    assert "a timestep is NaN" in observation.trouble


def several(probe: Probe, *timesteps: Tensor) -> CallObservation:
    return probe.observe(timesteps[0], torch.zeros(2, 3), (), more=timesteps[1:])


def test_of_several_timesteps_the_middle_one_counts_and_each_of_them_moves_the_position() -> None:
    probe = Probe()
    first = several(probe, torch.tensor([[0.0, 9.0, 9.0, 9.0]]))
    second = several(probe, torch.tensor([[0.0, 9.0, 9.0, 8.0]]))
    assert (first.timestep, second.timestep) == (9.0, 9.0)
    assert first.position is not None
    assert second.position is not None
    assert second.position < first.position
    assert first.key != second.key
    assert several(probe, torch.tensor([[0.0, 9.0, 9.0, 8.0]])).key == second.key


def test_one_timestep_an_input_is_told_by_its_numbers() -> None:
    observation = several(Probe(), torch.tensor([9.0, 9.0]), torch.tensor([[4.0, 4.0], [4.0, 4.0]]))
    assert (observation.timestep, observation.position, observation.key) == (9.0, 13.0, (9.0, 4.0))


@pytest.mark.parametrize(
    ("timesteps", "by_sample"),
    [
        (torch.tensor([2.0, 1.0]), True), (torch.tensor([3.0, 2.0, 1.0]), False),
        (torch.tensor([[2.0, 1.0], [2.0, 1.0]]), False), (torch.tensor([[2.0, 1.0], [2.0, 2.0]]), True),
    ],
)  # fmt: skip
def test_timesteps_of_samples_are_told_from_those_of_tokens(timesteps: Tensor, by_sample: bool) -> None:
    """A latent has two samples here; three timesteps are a table that tokens index."""
    assert several(Probe(), timesteps).by_sample is by_sample


def test_timesteps_that_move_both_ways_are_trouble_until_they_move_one_way_again() -> None:
    probe = Probe()
    troubles = [several(probe, torch.tensor([[a, b]])).trouble for a, b in [(9.0, 5.0), (8.0, 6.0), (7.0, 6.0)]]
    assert ["up and down at once" in trouble for trouble in troubles] == [False, True, False]


def test_only_coarse_dtypes_say_that_steps_may_fall_together() -> None:
    dtypes = [torch.float64, torch.float32, torch.int64, torch.bfloat16, torch.float16]
    eps = [Probe().observe(torch.ones(2, dtype=dtype), None, ()).eps for dtype in dtypes]
    assert eps == [0.0, 0.0, 0.0, 2.0**-7, 2.0**-10]


def test_a_missing_timestep_is_trouble_that_names_the_remedy() -> None:
    observation = Probe().observe(None, torch.zeros(2), ())
    assert observation.timestep is None
    assert "stream=" in observation.trouble


# -- the latent -------------------------------------------------------------------------------------------------------


def jumps(*latents: Tensor) -> list[float]:
    probe, t = Probe(), torch.tensor([1.0])
    return [probe.observe(t, latent, ()).jump for latent in latents]


def test_the_first_latent_is_no_jump() -> None:
    assert jumps(torch.ones(2, 3)) == [0.0]


def test_the_jump_is_relative_to_the_latent_before() -> None:
    x = torch.randn(2, 4, 8, 8)
    assert jumps(x, x * 1.5, x * 1.5)[1:] == pytest.approx([0.5, 0.0])


def test_independent_noise_is_a_jump_of_root_two() -> None:
    torch.manual_seed(0)
    assert jumps(torch.randn(2, 4, 32, 32), torch.randn(2, 4, 32, 32))[1] == pytest.approx(math.sqrt(2), abs=0.05)


def test_one_exchanged_sample_in_a_large_batch_is_a_jump() -> None:
    torch.manual_seed(0)
    batch = torch.randn(16, 4, 8, 8)
    other = batch.clone()
    other[5] = torch.randn(4, 8, 8)
    assert jumps(batch, other)[1] > 1.0
    assert jumps(batch, batch[torch.arange(15, -1, -1)])[1] > 1.0


def test_tokens_without_a_batch_are_one_sample() -> None:
    tokens = torch.ones(64, 8)
    other = tokens.clone()
    other[0] = 3.0
    assert jumps(tokens, other)[1] == pytest.approx(2 / 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_latents_do_not_overflow(dtype: torch.dtype) -> None:
    x = torch.full((1, 4, 64, 64), 300.0, dtype=dtype)
    assert jumps(x, x * 2)[1] == pytest.approx(1.0)


def test_a_latent_that_is_not_finite_gives_no_finite_jump() -> None:
    x = torch.ones(3, 2, 2)
    bad = x.clone()
    bad[1, 0, 0] = math.nan
    assert not any(math.isfinite(jump) for jump in jumps(x, bad, x)[1:])


def test_the_latent_is_copied_so_that_a_sampler_may_work_in_place() -> None:
    probe, t, x = Probe(), torch.tensor([1.0]), torch.ones(1, 2, 2)
    probe.observe(t, x, ())
    x.mul_(3)
    assert probe.observe(t, x, ()).jump == pytest.approx(2.0)


def test_a_latent_of_zeros_is_survived() -> None:
    assert jumps(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)) == [0.0, 0.0]
    assert jumps(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))[1] > 1e6
