"""PARTIAL rows against the oracle, step by step, in float64: branches, tokens, keys and values, what is chosen.

Routers are made to flip: latents move far from step to step, and one test turns the order of the slots at random.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.fx import is_experts
from moeca_compile.schedule import Control, Partial, Schedule
from tests.following import Runner, Subject, subject_of
from tests.models import DiT
from tests.reference import Reference
from tests.tools import schedule_of

NO_DEADLINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LEGEND = {
    "a": Partial(0.25, 0.25),
    "b": Partial(0, 0.2),
    "c": Partial(0.5, 0),
    "d": Partial(0, 0),
    "e": Partial(1, 0),
    "f": Partial(0.01, 1),
}
WILD, TAME = 1.5, 0.1


def inputs(step: int, speed: float, tokens: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    size = 2 * int(tokens**0.5)
    x, drift = (torch.randn(2, 2, size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * torch.tensor(speed * step).cos() + drift * torch.tensor(speed * step).sin()
    return {"x": x, "t": torch.full((2,), 900.0 - 40 * step), "y": torch.tensor([1, 5])}


@cache
def subject(style: str = "numpy", top_k: int = 2, speed: float = WILD, shared: bool = True) -> Subject:
    torch.manual_seed(0)
    model = DiT(
        style=style, depth=2, dim=16, heads=2, num_experts=5, top_k=top_k, hidden=12, size=4, channels=2, shared=shared
    )
    model = model.double().eval().requires_grad_(False)
    moeca.prepare(model)
    return subject_of(model, partial(inputs, speed=speed))


def follow(one: Subject, schedule: Schedule) -> int:
    """Run the schedule's rows beside the oracle; how many transitions there were."""
    runner, oracle = Runner(one, schedule), Reference(one.captured.gm, one.context.regions, schedule)
    runner.start()
    flips, last = 0, None
    for step, row in enumerate(schedule.rows):
        args = one.call(step)
        (found,), (wanted,) = runner(row, args), oracle(row, args)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, step=step: f"{step}: {text}")
        ids = next(oracle.env[n.args[1]] for n in one.captured.gm.graph.nodes if is_experts(n)).sort(dim=1).values
        flips += 0 if last is None else int((ids != last).any(dim=1).sum())
        last = ids
    return flips


@st.composite
def schedules(draw: st.DrawFn, one: Subject) -> Schedule:
    order = draw(st.integers(0, 2))
    letters = "".join(LEGEND) + ("CRF" if order else "CR")
    rows = draw(st.lists(st.text(letters, min_size=4, max_size=4), min_size=1, max_size=5))
    score = draw(st.sampled_from(["drift", "error"]))
    moe = ["blocks.0.moe", "blocks.1.moe"]
    weights = st.lists(st.floats(0.1, 4), min_size=5, max_size=5).map(tuple)
    sensitivity = draw(st.dictionaries(st.sampled_from(moe), weights))
    quota = draw(st.dictionaries(st.sampled_from(moe), st.sampled_from([(0.2,) * 5, (0.6, 0.4, 0.0, 0.0, 0.0)])))
    return schedule_of(
        one.analysis, "CCCC", *rows, order=order, legend=LEGEND, control=Control(score, sensitivity, quota)
    )


@pytest.mark.parametrize("speed", [WILD, TAME])
@pytest.mark.parametrize("style", ["numpy", "nonzero"])
@settings(NO_DEADLINE, max_examples=5)
@given(data=st.data())
def test_any_partial_schedule_is_run_as_the_oracle_says(style: str, speed: float, data: st.DataObject) -> None:
    one = subject(style, speed=speed)
    follow(one, data.draw(schedules(one)))
