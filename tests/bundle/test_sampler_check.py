"""A bundle notices a sampler that its output weights weren't fitted for."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest

import moeca_compile as moeca
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import call_of, warnings_of
from tests.bundle.test_output import STEPS, TIMES, in_numpy, ruled, sample
from tests.models import DiT


@pytest.mark.slow
def test_another_guidance_than_the_weights_were_fitted_for_is_noticed(model: DiT, tmp_path: Path) -> None:
    schedule = ruled()
    assert schedule.output is not None
    update = (1.0, -2 / STEPS, 1 / STEPS)  # of Euler steps with guidance 2
    schedule = replace(schedule, output=replace(schedule.output, update=update))
    bundle = moeca.export(model, call_of(2), schedule, tmp_path / "b", granularity="output")
    session = Session.open(bundle.path, threads=1)
    with session.trajectory() as trajectory:
        assert not warnings_of(lambda: sample(in_numpy(trajectory), times=TIMES[:3]))
    for expected in (1, 0):  # once
        with session.trajectory() as trajectory:
            model_of_numpy = in_numpy(trajectory)
            warnings = warnings_of(functools.partial(sample, model_of_numpy, times=TIMES[:3], scale=3.0))
        assert len([text for text in warnings if "guidance, solver or step size are others" in text]) == expected
