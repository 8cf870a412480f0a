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
from moeca_compile.planner.output import together
from moeca_compile.planner.output.emulated import EmulatedSampler, RecordedCalls, State
from moeca_compile.planner.output.gram import gram_of, summed
from moeca_compile.planner.output.paths import record_path
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


@pytest.mark.parametrize(
    ("sample", "parts", "terms"), [(guided, 2, (*TERMS, "y2", "d0")), (two_calls, 2, TERMS), (second_order, 1, TERMS)]
)
def test_the_emulated_run_from_the_middle_is_the_samplers_own(sample: Any, parts: int, terms: tuple[str, ...]) -> None:
    """With one weight changed, the emulated run goes on from that step; the sampler runs anew from the first."""
    sampled, schedule = SampledModel(Velocity().eval(), sample, "output", "eager"), a_schedule(terms)
    sampler, calls = sampler_of(sampled, parts), RecordedCalls()
    path = record_path(sampled, 5, schedule, calls)
    assert sorted(calls.calls) == list(COMPUTED)
    assert schedule.output is not None
    emulated = EmulatedSampler(sampler, terms, calls)
    with torch.no_grad():
        states = emulated.run(State(path.states[0]), schedule.output.weights)
        torch.testing.assert_close(states[-1].latent, path.samples, atol=1e-4, rtol=1e-4)
        for step, state in enumerate(path.states):
            torch.testing.assert_close(states[step].latent, state, atol=1e-4, rtol=1e-4)
        for step in (0, 6):
            row = [weight + 0.2 for weight in schedule.output.weights[step]]
            if step == 0:
                row = [row[0], row[1], *[0.0] * (len(terms) - 2)]
            rows = [*schedule.output.weights[:step], tuple(row), *schedule.output.weights[step + 1 :]]
            changed = replace(schedule, output=replace(schedule.output, weights=tuple(rows)))
            known = replace(states[step], outputs=states[step + 1].outputs)
            moved = emulated.run(emulated.moved(step, known, row), schedule.output.weights, step + 1)[-1].latent
            real = record_path(sampled, 5, changed).samples
            assert (real - path.samples).abs().max() > 0.01
            torch.testing.assert_close(moved, real, atol=2e-4, rtol=2e-4)


def a_study(
    wanted: Callable[[SampledModel, int], torch.Tensor], model: Any = None, sample: Any = guided,
    seeds: tuple[int, ...] = (0, 1, 2, 3),
) -> Any:  # fmt: skip
    sampled = SampledModel(model or Velocity().eval(), sample, "output", "eager")
    truth = {seed: SimpleNamespace(states=[wanted(sampled, seed)]) for seed in seeds}
    errors_to = lambda one, other: (one - other).square().flatten(1).mean(1).tolist()  # noqa: E731
    return SimpleNamespace(
        request=SimpleNamespace(seeds=seeds, effort=10.0),
        wanted=truth,
        sampled=sampled,
        data_range=4.0,
        errors_to=errors_to,
    )


def quality(study: Any, schedule: Schedule, seeds: tuple[int, ...]) -> float:
    errors = (study.errors_to(study.wanted[seed].states[-1], study.sampled.run(seed, schedule)) for seed in seeds)
    return mean_psnr(errors, study.data_range)


def test_weights_of_all_computed_steps_come_nearer_to_samples_that_no_fit_has_seen() -> None:
    """Three of four seeds are fitted to; what is told of the fourth is what a run gives."""
    study = a_study(lambda sampled, seed: sampled.run(seed))
    sampler, start = sampler_of(study.sampled, 2), a_schedule()
    before, spent = quality(study, start, (3,)), study.sampled.seconds
    reached, schedule = fit_together(study, (3,), sampler, start, before)
    assert reached > before + 3
    assert quality(study, schedule, (3,)) == pytest.approx(reached, abs=1e-6)
    assert study.sampled.seconds > spent
    assert [row[0] for row in schedule.rows] == [row[0] for row in start.rows]


def test_the_start_stays_where_nothing_better_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    study, start = a_study(lambda sampled, seed: sampled.run(seed)), a_schedule()
    sampler = sampler_of(study.sampled, 2)
    assert fit_together(study, (3,), sampler, start, 150.0) == (150.0, start)  # nothing is better than exact
    wrong = [replace(step, keep=0.5) for step in sampler]  # runs by it end elsewhere than the sampler's
    before = quality(study, start, (3,))
    assert fit_together(study, (3,), wrong, start, before) == (before, start)
    study.request.effort = (price(start) - 0.01) / together.SHARE
    monkeypatch.setattr(study.sampled, "run", None)  # derivatives on one seed would cost too much: nothing runs
    assert fit_together(study, (3,), sampler, start, before) == (before, start)


def under_autocast(model: Any, seed: int) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return guided(model, seed)


def test_a_model_that_runs_under_the_samplers_autocast_only(recwarn: pytest.WarningsRecorder) -> None:
    """Its weights are in bfloat16, its inputs in float32; derivatives are taken above that rounding."""
    study = a_study(lambda sampled, seed: sampled.run(seed), Velocity().bfloat16().eval(), under_autocast)
    sampler, start = sampler_of(study.sampled, 2), a_schedule()
    before = quality(study, start, (3,))
    reached, schedule = fit_together(study, (3,), sampler, start, before)
    assert reached > before + 2
    assert quality(study, schedule, (3,)) == pytest.approx(reached, abs=1e-6)
    assert not [one for one in recwarn if "fitted together" in str(one.message)]


def test_a_model_that_fails_outside_the_samplers_loop_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    study, start = a_study(lambda sampled, seed: sampled.run(seed)), a_schedule()
    sampler, before = sampler_of(study.sampled, 2), quality(study, start, (3,))

    def fail(*_: Any) -> Any:
        raise RuntimeError("no such adapter")

    monkeypatch.setattr(RecordedCalls, "model", fail)
    with pytest.warns(MoecaWarning, match="aren't fitted together, .* outside the sampler's loop: no such adapter"):
        assert fit_together(study, (3,), sampler, start, before) == (before, start)
    monkeypatch.setattr(EmulatedSampler, "run", lambda self, state, *_: [State(state.latent * float("nan"))] * 13)
    assert fit_together(study, (3,), sampler, start, before) == (before, start)


def test_the_price_counts_the_models_calls_after_each_changed_weight() -> None:
    # before computed step 1 only x and y0 have values; then x, y0 and y1, each with fewer steps to go
    assert price(a_schedule()) == (2 * 4 + 3 * 3 + 3 * 2 + 3 * 1 + 3 * 0) / STEPS
    assert price(a_schedule(("x", "y0", "d0"))) == (3 * 4 + 3 * 3 + 3 * 2 + 3 * 1) / STEPS


@pytest.mark.slow
@pytest.mark.parametrize("sample", [guided, two_calls, second_order])
def test_calibrate_fits_all_weights_together(sample: Any) -> None:
    schedule = moeca.calibrate(
        Velocity().eval(), sample, budget="macs:0.5", granularity="output", inner="eager", seeds=8, holdout=4,
        progress=False,
    )  # fmt: skip
    predicted = schedule.predicted
    assert predicted["tried fitted together"] > predicted["tried fitted again"] + 3
    assert predicted["psnr_db_holdout"] > predicted["tried fitted again"] + 3
