"""Native code of what the small package lacks: prologues, branch rows, adaptive rows; minutes of g++."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moeca_compile as moeca
from examples import digits
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.action import Action, Partial
from tests.packages.conftest import call_at, compiled, sample, small_model

pytestmark = pytest.mark.slow
C, F = Action.COMPUTE, Action.FORECAST


@pytest.mark.parametrize(
    "schedule",
    [
        "adaptive:0.05",
        Schedule(((C,), (Partial(0.25, 0.5),), (Partial(0.0, 0.25, True),)), order=1, period=3),
        Schedule(((C,), (F,)), order=2, period=2),
    ],
)
def test_every_kind_of_schedule(tmp_path: Path, schedule: Any) -> None:
    handle = compiled(small_model(), schedule=schedule, disable=())
    moeca.save(handle, tmp_path / "p", *call_at())
    loaded = moeca.load(tmp_path / "p")
    assert [prologue.name for prologue in loaded.package.manifest.sizes[0].prologues] == ["prologue_step"]
    torch.testing.assert_close(sample(loaded), sample(handle), rtol=1e-4, atol=1e-4)
    assert [step.variant for step in loaded.stats().steps] == [step.variant for step in moeca.stats(handle).steps]


def test_digits(tmp_path: Path) -> None:
    path = Path(digits.__file__).parent / "schedules" / "digits_34.json"
    model = digits.load_model().requires_grad_(False)
    x, t, y = torch.zeros(4, 1, digits.SIZE, digits.SIZE), torch.zeros(4), digits.labels_of(4)
    moeca.save(moeca.compile(model, schedule=path), tmp_path / "p", x, t, y)
    loaded = moeca.load(tmp_path / "p")
    expected = digits.sample(moeca.compile(model, schedule=path, inner="eager"), seed=0, n=2)
    psnr = digits.psnr(digits.sample(loaded, seed=0, n=2), expected)
    assert psnr.min() > 60
    assert 0.3 < loaded.stats().mac_fraction < 0.4
