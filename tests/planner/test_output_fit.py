"""Weights of the model's output, fitted offline through the user's sampler: nearer to the truth than the polynomial."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import ScheduleError
from moeca_compile.planner import output_fit
from moeca_compile.planner.output_fit import OutputFit, record_path
from moeca_compile.planner.rollout import SampledModel

STEPS = 12


class Velocity(nn.Module):
    """A curved flow with a label; no transformer, and its graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        hidden = torch.sin(3 * self.a(x) + 4 * t.reshape(-1, 1, 1, 1)) * (1 + 0.2 * y.reshape(-1, 1, 1, 1))
        return self.b(hidden) + 0.5 * x


def guided(model: Any, seed: int, steps: int = STEPS) -> Tensor:
    """Euler, with both halves of the guidance in one batch."""
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        t = torch.full((8,), 1.0 - step / steps)
        c, u = model(torch.cat([x, x]), t, torch.tensor([1.0] * 4 + [0.0] * 4)).chunk(2)
        x = x - (u + 2 * (c - u)) / steps
    return x


def noisy(model: Any, seed: int, steps: int = STEPS) -> Tensor:
    """With noise at every step."""
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 2, 4, 4, generator=dice)
    for step in range(steps):
        x = x - model(x, torch.full((8,), 1.0 - step / steps), torch.ones(8)) / steps
        x = x + 0.3 * torch.randn(x.shape, generator=dice)
    return x


def calibrated(truth: str, sample: Any = guided, **options: Any) -> moeca.Schedule:
    options = {"seeds": 8, "holdout": 4, "budget": "macs:0.5", **options}
    return moeca.calibrate(
        Velocity().eval(), sample, granularity="output", inner="eager", truth=truth,
        progress=False, **options,
    )  # fmt: skip


def test_fitted_weights_come_nearer_than_the_polynomial(tmp_path: Any) -> None:
    schedule = calibrated("uncached")
    assert schedule.output is not None
    assert schedule.granularity == "output"
    assert schedule.predicted["psnr_db"] > schedule.predicted["tried without weights"] + 1
    assert schedule.predicted["trajectories"] > 8 + 8 + 3 * 8 * 0.4  # twice uncached, and three rounds at about a half
    # what is told of held-out seeds is what the schedule gives to a user who loads it
    schedule.save(tmp_path / "one.json")
    model = Velocity().eval().requires_grad_(False)
    handle = moeca.compile(model, schedule=tmp_path / "one.json", granularity="output", inner="eager")
    with torch.no_grad():
        truth, samples = (torch.cat([guided(one, seed) for seed in range(1000, 1004)]) for one in (model, handle))
    assert moeca.stats(handle).mac_fraction <= 0.5
    assert all(not record.cold for record in moeca.stats(handle).steps)
    error = (samples - truth).square().flatten(1).mean(1)
    spread = max(float(guided(model, seed).max() - guided(model, seed).min()) for seed in range(1))
    assert error.mean().sqrt() < 0.05 * spread


def test_fitted_to_the_converged_solution_it_is_nearer_to_that_than_the_uncached_run() -> None:
    predicted = calibrated("converged", budget="macs:1").predicted
    assert predicted["psnr_db_converged_holdout"] > predicted["uncached_psnr_db_converged_holdout"]


def test_the_sampler_is_read_off_its_runs() -> None:
    sampled = SampledModel(Velocity().eval(), guided, "output", "eager")
    paths = [record_path(sampled, seed) for seed in range(3)]
    fit = OutputFit(paths, [True] * STEPS, [path.states for path in paths])
    for step in fit.sampler:
        assert step.keep == pytest.approx(1, abs=1e-3)
        assert step.now == pytest.approx((-2 / STEPS, 1 / STEPS), abs=1e-3)
    # all steps computed and fitted to the run itself: the weights leave the output as it is
    weights = fit.fit(paths)
    states = paths[0].states[0]
    assert states.shape[0] == 8
    for row in weights:
        known = dict(zip(fit.terms, row, strict=True))
        assert sum(known[term] for term in ("y0", "y1", "y2")) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"truth": "true"}, "truth='true', expected one of"),
        ({"truth": "converged", "granularity": "region"}, "granularity='output'"),
        ({"truth": "converged", "sample": lambda model, seed: guided(model, seed)}, "keyword steps"),
        ({"truth": "uncached", "sample": noisy}, "isn't linear in what the model returns"),
        ({"truth": "uncached", "seeds": 2}, "samples are too few|isn't linear"),
    ],
)
def test_what_can_not_be_fitted_is_said(options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_fit, "SAMPLES_PER_TERM", 3)
    arguments = {"sample": guided, "granularity": "output", "seeds": 4, "holdout": 1, **options}
    with pytest.raises(ScheduleError, match=says):
        moeca.calibrate(
            Velocity().eval(), arguments.pop("sample"), budget="macs:0.5", inner="eager", progress=False, **arguments
        )
