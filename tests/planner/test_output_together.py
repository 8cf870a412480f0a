"""The weights of all steps fitted together: derivatives are those of real runs, and rollouts decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from moeca_compile.planner.output import derivatives as derived
from moeca_compile.planner.output import together
from moeca_compile.planner.output.derivatives import DIRECTIONS, derivatives
from moeca_compile.planner.output.emulated import EmulatedSampler, RecordedCalls
from moeca_compile.planner.output.gauss_newton import Step
from moeca_compile.planner.output.gram import gram_of, summed
from moeca_compile.planner.output.paths import Path, record_path
from moeca_compile.planner.output.sampler import SamplerStep, sampler_steps
from moeca_compile.planner.output.together import fit_together, price
from moeca_compile.planner.rollout import SampledModel
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.schedule import Action, Schedule
from moeca_compile.schedule.output import OutputRule
from tests.curved_flow import STEPS, Velocity, guided, second_order, two_calls

COMPUTED = (0, 1, 3, 6, 9)
TERMS = ("x", "y0", "y1")


def a_schedule(terms: tuple[str, ...] = TERMS, **options: Any) -> Schedule:
    """Order 1 between the computed steps, as weights."""
    rows, weights, last = [], [], (0, 0)
    for step in range(STEPS):
        computes = step in COMPUTED
        rows.append((Action.COMPUTE if computes else Action.FORECAST,))
        last = (step, last[0]) if computes else last
        ahead = (step - last[0]) / max(1, last[0] - last[1])
        known = {"y0": 1 + ahead, "y1": -ahead if ahead else 0.0}
        weights.append(tuple(known.get(term, 0.0) for term in terms))
    rule = OutputRule(terms, tuple(weights), **options)
    return Schedule(tuple(rows), order=1, granularity="output", output=rule)


def sampler_of(sampled: SampledModel, parts: int) -> list[SamplerStep]:
    paths = [record_path(sampled, seed) for seed in range(3)]
    return sampler_steps(summed([gram_of(path, path.states) for path in paths]), STEPS, parts)


SAMPLERS = [(guided, 2, (*TERMS, "y2", "d0")), (two_calls, 2, TERMS), (second_order, 1, TERMS)]


def emulated_of(sample: Any, parts: int, schedule: Schedule) -> tuple[SampledModel, EmulatedSampler, Path]:
    sampled = SampledModel(Velocity().eval(), sample, "output", "eager")
    sampler, calls = sampler_of(sampled, parts), RecordedCalls()
    path = record_path(sampled, 5, schedule, calls)
    assert sorted(calls.calls) == list(COMPUTED)
    assert schedule.output is not None
    return sampled, EmulatedSampler(sampler, schedule.output.terms, calls), path


@pytest.mark.parametrize(("sample", "parts", "terms"), SAMPLERS)
def test_derivatives_are_those_of_real_runs(
    sample: Any, parts: int, terms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler runs anew with one weight changed. With all directions the derivatives are exact, with few near."""
    schedule = a_schedule(terms)
    sampled, emulated, path = emulated_of(sample, parts, schedule)
    with torch.no_grad():
        _, places, few = derivatives(emulated, path.states[0], schedule.output.weights)
        monkeypatch.setattr(derived, "DIRECTIONS", 1000)
        end, same, every = derivatives(emulated, path.states[0], schedule.output.weights)
    torch.testing.assert_close(end, path.samples, atol=1e-4, rtol=1e-4)
    live = {step: [name for name in terms if name == "x" or int(name[1:]) <= COMPUTED.index(step)] for step in COMPUTED}
    assert places == same == [(step, terms.index(name)) for step in COMPUTED for name in live[step]]
    assert len(places) > 2 * DIRECTIONS
    for number in (0, 4, len(places) - 1):
        step, term = places[number]
        rows = [list(row) for row in schedule.output.weights]
        rows[step][term] += 0.01
        changed = replace(schedule, output=replace(schedule.output, weights=tuple(map(tuple, rows))))
        real = (record_path(sampled, 5, changed).samples - path.samples) / 0.01
        assert real.abs().max() > 0.01
        assert float((every[number] - real).norm() / real.norm()) < 0.02
        assert float((few[number] - real).norm() / real.norm()) < 0.04


def a_study(
    wanted: Callable[[SampledModel, int], torch.Tensor], model: Any = None, sample: Any = guided,
    seeds: tuple[int, ...] = (0, 1, 2, 3),
) -> Any:  # fmt: skip
    sampled = SampledModel(model or Velocity().eval(), sample, "output", "eager")
    truth = {seed: SimpleNamespace(states=[wanted(sampled, seed)]) for seed in seeds}
    errors_to = lambda one, other: (one - other).square().flatten(1).mean(1).tolist()  # noqa: E731
    return SimpleNamespace(
        request=SimpleNamespace(seeds=seeds, effort=10.0, memory=2**30),
        wanted=truth,
        sampled=sampled,
        data_range=4.0,
        errors_to=errors_to,
    )


def quality(study: Any, schedule: Schedule, seeds: tuple[int, ...]) -> float:
    errors = (study.errors_to(study.wanted[seed].states[-1], study.sampled.run(seed, schedule)) for seed in seeds)
    return mean_psnr(errors, study.data_range)


SEEDS = (0, 1, 2, 3)  # of a study
OTHERS = (7, 8)  # that nothing is fitted to


def test_weights_of_all_computed_steps_come_nearer_to_samples_that_no_fit_has_seen() -> None:
    study = a_study(lambda sampled, seed: sampled.run(seed), seeds=(*SEEDS, *OTHERS))
    study.request.seeds = SEEDS
    sampler, start = sampler_of(study.sampled, 2), a_schedule()
    before, spent = quality(study, start, OTHERS), study.sampled.seconds
    found = fit_together(study, sampler, start)
    assert found is not None
    assert quality(study, found.schedule, OTHERS) > before + 3
    assert found.before == pytest.approx(quality(study, start, SEEDS), abs=1e-6)
    # leave-one-out tells what others give, or less: each fit lacks a seed
    assert found.before + 3 < found.reached < quality(study, found.schedule, OTHERS) + 1
    assert study.sampled.seconds > spent
    assert [row[0] for row in found.schedule.rows] == [row[0] for row in start.rows]


def test_a_seed_is_checked_by_weights_that_are_fitted_to_the_others() -> None:
    """Where a seed wants other samples, it doesn't lead the weights that it is checked by."""
    study, start = a_study(lambda sampled, seed: sampled.run(seed)), a_schedule()
    sampler = sampler_of(study.sampled, 2)
    fit = Step.of(study, SEEDS, sampler, start)
    kept = fit.moved(1e-3, without=3)
    one = fit.equations[3]
    fit.equations = [*fit.equations[:3], replace(one, right=100 * one.right, normal=9 * one.normal)]
    assert fit.moved(1e-3, without=3) == kept
    assert fit.moved(1e-3) != kept


def test_the_start_stays_where_nothing_better_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    study, start = a_study(lambda sampled, seed: sampled.run(seed)), a_schedule()
    sampler = sampler_of(study.sampled, 2)
    before = quality(study, start, SEEDS)
    with monkeypatch.context() as patched:
        patched.setattr(Step, "checked", lambda *_: before + 0.9 * together.LEAST)
        found = fit_together(study, sampler, start)
    assert found is not None
    assert found.schedule == start
    assert (found.before, found.reached) == pytest.approx((before, before + 0.9 * together.LEAST))
    wrong = [replace(step, keep=0.5) for step in sampler]  # runs by it end elsewhere than the sampler's
    with pytest.warns(
        MoecaWarning,
        match="aren't fitted together, as the sampler's steps, each by itself, don't lead to its samples, but",
    ):
        assert fit_together(study, wrong, start) is None
    study.request.effort = (2 * price(start) - 0.01) / together.SHARE
    monkeypatch.setattr(study.sampled, "run", None)  # derivatives on two seeds would cost too much: nothing runs
    assert fit_together(study, sampler, start) is None


def test_derivatives_that_take_too_much_memory_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    study, start = a_study(lambda sampled, seed: sampled.run(seed)), a_schedule()
    sampler = sampler_of(study.sampled, 2)
    latent = study.wanted[0].states[0]
    study.request.memory = 15 * latent.numel()  # 15 weights: four latents of 4 bytes each aren't enough
    monkeypatch.setattr(study.sampled, "run", None)  # nothing runs
    with pytest.warns(MoecaWarning, match=r"aren't fitted together, as their derivatives take \d+ bytes, and 4 times"):
        assert fit_together(study, sampler, start) is None


class Gated(Velocity):
    """At the first steps the guidance changes nothing."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x, t, torch.where(t > 0.8, torch.ones_like(y), y))


def test_a_weight_that_changes_nothing_stays() -> None:
    """The halves' difference has no size at the first steps, so its weight may not grow."""
    study, start = a_study(lambda sampled, seed: sampled.run(seed), Gated().eval()), a_schedule((*TERMS, "d0", "d1"))
    found = fit_together(study, sampler_of(study.sampled, 2), start)
    assert found is not None
    assert found.schedule != start
    assert found.schedule.output.weights[0][3:] == (0.0, 0.0)
    assert found.schedule.output.weights[1][3:] == (0.0, 0.0)
    assert max(abs(weight) for row in found.schedule.output.weights for weight in row) < 20


def under_autocast(model: Any, seed: int) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return guided(model, seed)


def test_a_model_that_runs_under_the_samplers_autocast_only(recwarn: pytest.WarningsRecorder) -> None:
    """Its weights are in bfloat16, its inputs in float32; derivatives are taken above that rounding."""
    study = a_study(lambda sampled, seed: sampled.run(seed), Velocity().bfloat16().eval(), under_autocast)
    sampler, start = sampler_of(study.sampled, 2), a_schedule()
    found = fit_together(study, sampler, start)
    assert found is not None
    assert found.reached > found.before + 2
    assert quality(study, found.schedule, SEEDS) > found.before + 2
    assert not [one for one in recwarn if "fitted together" in str(one.message)]


ADAPTERS: list[str] = []  # that a sampler sets around its loop


class Adapted(Velocity):
    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not ADAPTERS:
            raise LookupError("no such adapter")
        return super().forward(x, t, y)


def with_adapter(model: Any, seed: int) -> torch.Tensor:
    ADAPTERS.append("one")
    try:
        return guided(model, seed)
    finally:
        ADAPTERS.clear()


def test_a_model_that_fails_outside_the_samplers_loop_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    study = a_study(lambda sampled, seed: sampled.run(seed), Adapted().eval(), with_adapter)
    sampler, start = sampler_of(study.sampled, 2), a_schedule()
    with pytest.warns(MoecaWarning, match="aren't fitted together, as .* outside the sampler's loop: no such adapter"):
        assert fit_together(study, sampler, start) is None
    monkeypatch.setattr(RecordedCalls, "model", lambda self, step, latent: (latent * float("nan"),) * 2)
    with pytest.warns(MoecaWarning, match="don't lead to its samples, but inf% of a latent beside"):
        assert fit_together(study, sampler, start) is None


def test_the_price_is_what_the_derivatives_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded run, the emulated one, and the directions; the first steps have fewer weights before them."""
    schedule = a_schedule()
    _, emulated, path = emulated_of(guided, 2, schedule)
    asked, model = [], RecordedCalls.model
    monkeypatch.setattr(RecordedCalls, "model", lambda *given: asked.append(given) or model(*given))
    with torch.no_grad():
        derivatives(emulated, path.states[0], schedule.output.weights)
    calls = len(asked)
    assert calls == len(COMPUTED) + 2 + 5 + 2 * DIRECTIONS
    spent = calls + len(COMPUTED)  # with the recorded run
    assert spent / STEPS <= price(schedule) <= (spent + 2) / STEPS


@pytest.mark.slow
@pytest.mark.parametrize("sample", [guided, two_calls, second_order])
def test_calibrate_fits_all_weights_together(sample: Any) -> None:
    schedule = moeca.calibrate(
        Velocity().eval(), sample, budget="macs:0.5", granularity="output", inner="eager", seeds=8, holdout=4,
        progress=False,
    )  # fmt: skip
    predicted = schedule.predicted
    assert predicted["tried fitted together"] > predicted["tried fitted step by step"] + 3
    assert predicted["psnr_db_holdout"] > predicted["tried fitted step by step"] + 3
