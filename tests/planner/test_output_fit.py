"""Weights of the model's output, fitted offline through the user's sampler: nearer to the truth than the polynomial."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, ScheduleError
from moeca_compile.planner.output.fit import Form, OutputFit
from moeca_compile.planner.output.gram import gram_of, summed
from moeca_compile.planner.output.paths import Path, converged_path, record_path
from moeca_compile.planner.output.sampler import sampler_steps
from moeca_compile.planner.rollout import SampledModel
from tests.curved_flow import STEPS, Velocity, guided, second_order, two_calls


def heun(model: Any, seed: int, steps: int = STEPS) -> Tensor:
    """Calls the model at two latents a step."""
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        t = torch.full((8,), 1.0 - step / steps)
        v = model(x, t, torch.ones(8))
        x = x - (v + model(x - v / steps, t, torch.ones(8))) / (2 * steps)
    return x


def noisy(model: Any, seed: int, steps: int = STEPS) -> Tensor:
    """With noise at every step."""
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 2, 4, 4, generator=dice)
    for step in range(steps):
        x = x - model(x, torch.full((8,), 1.0 - step / steps), torch.ones(8)) / steps
        x = x + 0.3 * torch.randn(x.shape, generator=dice)
    return x


def calibrated(truth: Any, sample: Any = guided, **options: Any) -> moeca.Schedule:
    options = {"seeds": 8, "holdout": 4, "budget": "macs:0.5", **options}
    return moeca.calibrate(
        Velocity().eval(), sample, granularity="output", inner="eager", truth=truth,
        progress=False, **options,
    )  # fmt: skip


def test_fitted_weights_come_nearer_than_the_polynomial(tmp_path: Any) -> None:
    schedule = calibrated("uncached")
    assert schedule.output is not None
    assert schedule.granularity == "output"
    assert schedule.predicted["psnr_db"] > schedule.predicted["tried without weights"] + 6
    # twice uncached, the check of the plan at two seeds, and the last rollouts at about a half
    assert schedule.predicted["trajectories"] > 8 + 8 + 2 * 0.4 + (8 + 4) * 0.4
    # what is told of held-out seeds is what the schedule gives to a user who loads it
    schedule.save(tmp_path / "one.json")
    model = Velocity().eval().requires_grad_(False)
    handle = moeca.compile(model, schedule=tmp_path / "one.json", granularity="output", inner="eager")
    with torch.no_grad():
        truth, samples = (torch.cat([guided(one, seed) for seed in range(1000, 1004)]) for one in (model, handle))
    assert moeca.stats(handle).mac_fraction <= 0.5
    assert all(not record.cold for record in moeca.stats(handle).steps)
    moeca.reset(handle)
    with torch.no_grad(), pytest.warns(MoecaWarning, match=r"guidance, solver or step size are others"):
        guided(handle, 1000, scale=3.0)
    error = (samples - truth).square().flatten(1).mean(1)
    spread = max(float(guided(model, seed).max() - guided(model, seed).min()) for seed in range(1))
    assert error.mean().sqrt() < 0.05 * spread


def test_fitted_to_the_converged_solution_it_is_nearer_to_that_than_the_uncached_run() -> None:
    predicted = calibrated("converged", budget="macs:1").predicted
    assert predicted["psnr_db_converged_holdout"] > predicted["uncached_psnr_db_converged_holdout"]


def test_an_output_is_held_back_by_how_far_the_latent_is_from_where_it_was_made() -> None:
    path = Path([torch.tensor([[1.0]]), torch.tensor([[3.0]])], {0: (torch.tensor([[2.0]]),)})
    own, other = gram_of(path, path.states), gram_of(path, [torch.tensor([[5.0]]), torch.tensor([[4.0]])])
    assert own.square(own.made_at(0) - own.vector("begin")) == 0
    assert other.square(other.made_at(0) - other.vector("begin")) == 0
    assert other.square(other.vector("wanted", 0) - other.vector("begin")) == 16


@pytest.mark.slow
def test_fitted_to_samples_of_ones_own_it_comes_nearer_to_them() -> None:
    """Here those are the same sampler's with four times the steps."""
    model = Velocity().eval()
    with torch.no_grad():
        samples = {seed: guided(model, seed, 4 * STEPS) for seed in (*range(8), *range(1000, 1004))}
    for truth in (samples, samples.__getitem__):
        schedule = calibrated(truth, budget="macs:1")
        assert schedule.output is not None
        assert schedule.output.truth == "given"
        assert schedule.predicted["psnr_db_given_holdout"] > schedule.predicted["uncached_psnr_db_given_holdout"] + 3


@pytest.mark.parametrize("sample", [pytest.param(two_calls, marks=pytest.mark.slow), second_order])
@pytest.mark.slow
def test_guidance_in_two_calls_and_solvers_of_second_order(sample: Any) -> None:
    predicted = calibrated("uncached", sample).predicted
    assert predicted["psnr_db"] > predicted["tried without weights"] + 1
    assert predicted["psnr_db_holdout"] > predicted["tried without weights"]


@pytest.mark.slow
def test_the_converged_states_are_nearer_than_those_of_four_times_the_steps() -> None:
    sampled = SampledModel(Velocity().eval(), guided, "output", "eager")
    uncached = record_path(sampled, 3)
    path = converged_path(sampled, 3, guided, uncached)
    with torch.no_grad():
        exact, fine = (guided(Velocity().eval(), 3, times * STEPS) for times in (256, 4))
    assert (path.samples - exact).norm() < 0.2 * (fine - exact).norm()
    assert len(path.states) == len(uncached.states)
    assert torch.equal(path.states[0], uncached.states[0])
    assert sampled.steps == STEPS  # the finer runs leave no trace


def test_the_sampler_is_read_off_its_runs() -> None:
    sampled = SampledModel(Velocity().eval(), guided, "output", "eager")
    paths = [record_path(sampled, seed) for seed in range(3)]
    assert [len(path.outputs[0]) for path in paths] == [2] * 3
    gram = summed([gram_of(path, path.states) for path in paths])
    steps = sampler_steps(gram, STEPS, 2)
    for step in steps:
        assert step.keep == pytest.approx(1, abs=1e-5)
        assert step.now == pytest.approx((-2 / STEPS, 1 / STEPS), abs=1e-5)
    # all steps computed and fitted to the run itself: the weights leave the output as it is
    fit = OutputFit(steps).fit(gram, [True] * STEPS, Form(("x", "y0", "y1"), 1e-9))
    for row in fit.weights[:-1]:
        assert row == pytest.approx((0, 1, 0), abs=0.02)
    assert gram.square(fit.miss) < 1e-8
    memory = [record_path(SampledModel(Velocity().eval(), second_order, "output", "eager"), seed) for seed in range(3)]
    last = sampler_steps(summed([gram_of(path, path.states) for path in memory]), STEPS, 1)[-1]
    assert (*last.now, *last.before) == pytest.approx((-1.5 / STEPS, 0.5 / STEPS), abs=1e-3)


def in_bfloat16(model: Any, seed: int) -> Tensor:
    """As pipelines do whose transformer is in bfloat16: the latent is rounded when the model is called."""
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        t = torch.full((8,), 1.0 - step / STEPS, dtype=torch.bfloat16)
        x = x - model(x.bfloat16(), t, torch.ones(8, dtype=torch.bfloat16)).float() / STEPS
    return x


def test_the_rounding_of_latents_in_16_bits_is_no_noise_of_the_sampler() -> None:
    sampled = SampledModel(Velocity().bfloat16().eval(), in_bfloat16, "output", "eager")
    paths = [record_path(sampled, seed) for seed in range(3)]
    assert [path.rounding for path in paths] == [2.0**-7] * 3
    gram = summed([gram_of(path, path.states) for path in paths])
    for step in sampler_steps(gram, STEPS, 1, paths[0].rounding):
        assert (step.keep, *step.now) == pytest.approx((1, -1 / STEPS), abs=0.01)
    with pytest.raises(ScheduleError, match="isn't linear in what the model returns"):
        sampler_steps(gram, STEPS, 1)  # as latents in float32 it would be noise


def test_rounding_does_not_hide_the_step_before() -> None:
    """Its share of an Adams-Bashforth step is smaller than the rounding of the latents."""

    def sample(model: Any, seed: int) -> Tensor:
        rounded = lambda x, t, y: model(x.bfloat16(), t.bfloat16(), y.bfloat16()).float()  # noqa: E731
        return second_order(rounded, seed)

    sampled = SampledModel(Velocity().bfloat16().eval(), sample, "output", "eager")
    paths = [record_path(sampled, seed) for seed in range(4)]
    steps = sampler_steps(summed([gram_of(path, path.states) for path in paths]), STEPS, 1, paths[0].rounding)
    for step in steps[1:]:
        assert (*step.now, *step.before) == pytest.approx((-1.5 / STEPS, 0.5 / STEPS), abs=0.015)


def test_a_fit_that_goes_on_from_another_is_the_same() -> None:
    sampled = SampledModel(Velocity().eval(), guided, "output", "eager")
    paths = [record_path(sampled, seed) for seed in range(3)]
    gram = summed([gram_of(path, path.states) for path in paths])
    fit, form = OutputFit(sampler_steps(gram, STEPS, 2)), Form(("x", "y0", "y1", "d0"), 1e-6)
    every = [True] * STEPS
    some = [step not in (5, 9) for step in range(STEPS)]
    assert fit.fit(gram, some, form, [fit.fit(gram, every, form)]).weights == fit.fit(gram, some, form).weights


@pytest.mark.filterwarnings("ignore:a timestep was visited again")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"truth": "true"}, "truth='true', expected one of uncached, converged, the samples of each seed"),
        ({"truth": {0: torch.zeros(4, 2, 4, 4)}}, "truth has no samples for seed"),
        ({"truth": lambda seed: torch.zeros(3)}, r"for seed \d+ have shape \[3\], the sampler's \[4, 2, 4, 4\]"),
        ({"truth": lambda seed: torch.full((4, 2, 4, 4), torch.nan)}, "aren't all finite"),
        ({"truth": "converged", "sample": lambda model, seed, steps=8: guided(model, seed)}, "as many steps as it is"),
        ({"sample": heun}, "twice with different latents|once a step or once for each part"),
        ({"sample": lambda model, seed: guided(model, seed)[:, :1]}, "must return the last latent"),
        ({"truth": "converged", "granularity": "region"}, "granularity='output'"),
        ({"truth": "converged", "sample": lambda model, seed: guided(model, seed)}, "keyword steps"),
        ({"truth": "uncached", "sample": noisy}, "isn't linear in what the model returns"),
        ({"truth": "uncached", "seeds": 2}, "8 samples are too few to fit 6 weights a step; at least 12 are needed"),
    ],
)
def test_what_can_not_be_fitted_is_said(options: dict[str, Any], says: str) -> None:
    arguments = {"sample": guided, "truth": "uncached", "granularity": "output", "seeds": 4, "holdout": 1, **options}
    with pytest.raises(ScheduleError, match=says):
        moeca.calibrate(
            Velocity().eval(), arguments.pop("sample"), budget="macs:0.5", inner="eager", progress=False, **arguments
        )


class Scaling(nn.Module):
    """Returns its latent, times a half, or times a number that depends on the place."""

    def __init__(self, is_even: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 0.5) if is_even else torch.tensor([0.1, 0.2, 0.4, 0.8]))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.scale * x


def test_a_singular_fit_is_refused_or_held_back() -> None:
    """A latent that can't be told from the output is refused. Parts of the guidance that are alike, and so the outputs
    of which one is the sum of others, are not: the weights stay small."""
    arguments: Any = {"budget": "macs:0.5", "granularity": "output", "inner": "eager", "progress": False, "seeds": 4}
    with pytest.raises(ScheduleError, match=r"proportional to the latent on all seeds.*\(a singular fit\)"):
        moeca.calibrate(Scaling(True).eval(), guided, **arguments)
    schedule = moeca.calibrate(Scaling(False).eval(), guided, holdout=1, effort=0, **arguments)
    assert schedule.predicted["psnr_db_holdout"] > 40
    rows = [] if schedule.output is None else schedule.output.weights
    assert all(abs(weight) < 20 for row in rows for weight in row)


@pytest.mark.slow
def test_samples_of_held_out_seeds_are_checked_too() -> None:
    def truth(seed: int) -> Tensor:
        return torch.zeros(4 if seed < 1000 else 1, 2, 4, 4)  # would be broadcast

    with pytest.raises(ScheduleError, match=r"truth gives for seed 1000 have shape \[1, 2, 4, 4\]"):
        calibrated(truth)
