"""Where the sampler's steps lie, searched with the weights of the model's output: `sample` takes `timesteps`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, ScheduleError
from moeca_compile.planner.output import place, rule, times
from moeca_compile.planner.output.given_times import path_at
from moeca_compile.planner.output.times import Placement
from moeca_compile.planner.output.together import FittedTogether
from moeca_compile.planner.rollout import SampledModel
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.front import Front

STEPS = 8
BUMP = 0.31  # between two of the sampler's own timesteps, 0.375 and 0.25


class Bump(nn.Module):
    """A flow that turns at one time alone, in a direction that only a computed step there can see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        place = (t.reshape(-1, 1, 1, 1) - BUMP) / 0.03
        return torch.sin(x) + 8 * torch.exp(-place * place) * torch.tanh(4 * self.mix(x))


def sample(
    model: Any, seed: int, steps: int = STEPS, timesteps: Sequence[float] | None = None, scale: float = 1.0
) -> Tensor:
    """Euler, at its own timesteps or at given ones."""
    x = scale * torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    times = timesteps or [1 - step / steps for step in range(steps)]
    for time, following in pairwise([*times, 0.0]):
        x = x + (following - time) * model(x, torch.full((8,), time))
    return x


def calibrated(model: nn.Module, sampler: Any, budget: Any = "macs:0.5", **options: Any) -> Any:
    arguments = {"granularity": "output", "inner": "eager", "seeds": 2, "holdout": 1, "effort": 0, **options}
    make: Any = moeca.calibrate if isinstance(budget, str) else moeca.calibrate_front
    name = "budget" if isinstance(budget, str) else "budgets"
    return make(model.eval(), sampler, truth="converged", progress=False, **{name: budget}, **arguments)


@pytest.fixture(autouse=True, scope="module")
def little() -> Iterator[None]:
    """Calibrations do less work than usual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(times, "MOVES", 300)
        patch.setattr(times, "TRIES", 1)
        patch.setattr(place, "MOVES", 50)
        patch.setattr(rule, "PLANS", 1)
        patch.setattr(rule, "EFFORT", 1.0)
        patch.setattr(rule, "RESPONSES", (1.0, 10.0))
        yield


@pytest.fixture(scope="module")
def front() -> Front:
    """A front of one schedule."""
    found: Front = calibrated(Bump(), sample, ["macs:0.5"])
    return found


@pytest.mark.parametrize("own", [40.0, 50.0])
def test_fits_to_all_seeds_decide_between_both(own: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts on one seed found the searched timesteps better; weights fitted together may say otherwise."""

    def fitted(study: Any, sampler: Any, start: Schedule) -> FittedTogether:
        quality = 45.0 if start.searched_timesteps else own
        return FittedTogether(start, 30.0, quality, quality, 2)

    monkeypatch.setattr(rule, "fit_together", fitted)
    schedule = calibrated(Bump(), sample)
    assert schedule.searched_timesteps == (own < 45)
    told = {name: schedule.predicted[f"tried {name}"] for name in ("own timesteps", "searched timesteps")}
    assert told == {"own timesteps": own, "searched timesteps": 45.0}
    assert schedule.predicted["tried fitted together"] == max(own, 45.0)


def test_what_rejected_weights_reached_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted(study: Any, sampler: Any, start: Schedule) -> FittedTogether:
        # at searched timesteps new weights were worse than those before, which stay
        return FittedTogether(start, 50.0, 40.0, 50.0, 2) if start.searched_timesteps else FittedTogether(
            start, 30.0, 46.0, 46.0, 2
        )  # fmt: skip

    monkeypatch.setattr(rule, "fit_together", fitted)
    assert calibrated(Bump(), sample).searched_timesteps


# at other timesteps that is noticed too:
@pytest.mark.filterwarnings("ignore:the sampler's first step ends", "ignore:.*output weights aren't used")
def test_a_step_is_computed_where_the_flow_turns(front: Front, tmp_path: Path) -> None:
    (schedule,) = front
    predicted = schedule.predicted
    assert predicted["tried searched timesteps"] > predicted["tried own timesteps"] + 3
    assert schedule.searched_timesteps
    assert len(schedule.timesteps) == STEPS
    assert schedule.timesteps[0] == 1.0
    assert all(after < before for before, after in pairwise(schedule.timesteps))
    computed = [time for time, row in zip(schedule.timesteps, schedule.rows, strict=True) if row[0].name == "COMPUTE"]
    assert len(computed) == 4
    assert min(abs(time - BUMP) for time in computed) < 0.03
    assert predicted["psnr_db_converged_holdout"] > predicted["uncached_psnr_db_converged_holdout"]
    assert "at searched timesteps" in schedule.made_by
    # what a user gets who loads it and passes the timesteps is what was predicted
    front.save(tmp_path / "front.json")
    loaded = moeca.Front.load(tmp_path / "front.json").at("macs:0.5")
    assert loaded == schedule
    model = Bump().eval().requires_grad_(False)
    handle = moeca.compile(model, schedule=loaded, granularity="output", inner="eager")
    with torch.no_grad():
        samples, exact = sample(handle, 1000, timesteps=loaded.timesteps), sample(model, 1000, 64 * STEPS)
        assert [record.cold for record in moeca.stats(handle).steps] == [False] * STEPS
        assert (samples - exact).norm() < 0.5 * (sample(model, 1000) - exact).norm()
        compared = moeca.compare(handle, sample, seeds=[1000], truth="converged", progress=False)  # passes them, too
        qualities = [contender.quality["converged"]["psnr_db"] for contender in compared.contenders]
        assert sum(qualities[-1]) > sum(qualities[0]) + 8  # of as many samples: a decibel each
        moeca.reset(handle)
        with pytest.warns(MoecaWarning, match=r"timesteps were searched: give the sampler schedule\.timesteps"):
            sample(handle, 1000)
    line = (
        f"the schedule was made for 8 timesteps, 1 to {loaded.timesteps[-1]:g}, which were searched: give the sampler"
    )
    assert line in str(moeca.explain(handle))
    assert line in str(moeca.stats(handle))
    assert moeca.stats(handle).timesteps == loaded.timesteps
    assert moeca.stats(handle).searched_timesteps


def ignoring(model: Any, seed: int, steps: int = STEPS, timesteps: Any = None) -> Tensor:
    return sample(model, seed, steps)


def thousandths(model: Any, seed: int, steps: int = STEPS, timesteps: Any = None) -> Tensor:
    return sample(model, seed, steps, timesteps and [time / 1000 for time in timesteps])


def fewer(model: Any, seed: int, steps: int = STEPS, timesteps: Any = None) -> Tensor:
    return sample(model, seed, steps, timesteps and timesteps[:-1])


@pytest.mark.parametrize(
    ("sampler", "says"),
    [
        (ignoring, r"given 3 of them, .* step 1 is to be at 0\.8125, and the model received 0\.875"),
        (thousandths, r"step 0 is to be at 1, and the model received 0\.001"),
    ],
)
def test_a_sampler_that_ignores_timesteps_is_refused(sampler: Any, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        calibrated(Bump(), sampler, holdout=0)


def test_all_steps_of_a_whole_run_are_checked() -> None:
    sampled = SampledModel(Bump().eval(), sample, "output", "eager")
    given = (1.0, 0.7, 0.4, 0.1)
    assert path_at(sampled, 0, sample, given).timesteps == pytest.approx(given)
    with pytest.raises(ScheduleError, match="given 4 of them, but made its steps elsewhere: it made 3 steps"):
        path_at(sampled, 0, fewer, given)


class Timeless(nn.Module):
    """A flow that takes no timestep."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(2 * x)


def test_where_timesteps_are_not_known_they_stay() -> None:
    def blind(model: Any, seed: int, steps: int = STEPS, timesteps: Any = None) -> Tensor:
        with moeca.trajectory(model, steps, stream="only"):
            return sample(lambda x, t: model(x), seed, steps)

    with pytest.warns(MoecaWarning, match="where the steps lie isn't searched"):
        schedule = calibrated(Timeless(), blind, holdout=0)
    assert not schedule.searched_timesteps


class Pipeline:
    """Stands for one of diffusers; the prompt says how large the first latent is."""

    def __init__(self, takes_any: bool = True) -> None:
        self.transformer, self.takes_any = Bump().eval(), takes_any

    def __call__(
        self, prompt: str, generator: Any, num_inference_steps: int = STEPS, timesteps: Any = None
    ) -> SimpleNamespace:
        if timesteps is not None and not self.takes_any:
            raise ValueError("this scheduler has no custom timesteps")
        return SimpleNamespace(
            images=sample(self.transformer, generator.initial_seed(), num_inference_steps, timesteps, len(prompt) / 5)
        )


@pytest.mark.parametrize("takes_any", [True, False])
def test_prompts_of_a_pipeline(takes_any: bool) -> None:
    """Searched with several prompts; or a scheduler that takes no timesteps is named."""
    pipe, expected = Pipeline(takes_any), nullcontext() if takes_any else pytest.warns(MoecaWarning, match="no custom")
    with expected:
        schedule = moeca.calibrate(
            pipe, prompts=["a fox", "a hare"], budget="macs:0.5", granularity="output", inner="eager", seeds=2,
            holdout=0, effort=0, truth="converged", progress=False,
        )  # fmt: skip
    assert schedule.searched_timesteps == takes_any
    assert ("tried searched timesteps" in schedule.predicted) == takes_any


def test_cheap_steps_halve_the_widest_gaps() -> None:
    assert times._filled("CFFFFFCF", 5, 9) == Placement((0, 1, 3, 4, 6), "CFFFC")
    assert times._filled("CC", 4, 4) == Placement((0, 1, 2, 3), "CCFF")


@pytest.mark.parametrize("entry", ['"yes"', "1", "null"])
def test_a_file_says_true_or_false(front: Front, entry: str) -> None:
    text = front.schedules[0].to_json()
    assert '"version": 6' in text
    with pytest.raises(ScheduleError, match=r"searched_timesteps is .*, expected true or false"):
        moeca.Schedule.from_json(text.replace('"searched_timesteps": true', f'"searched_timesteps": {entry}'))


def test_searched_timesteps_are_there() -> None:
    with pytest.raises(ScheduleError, match="searched_timesteps is true, but there are no timesteps"):
        moeca.Schedule(((moeca.schedule.Action.COMPUTE,),), searched_timesteps=True)
