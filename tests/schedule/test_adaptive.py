"""Adaptive schedules through the compiled model: compiled rows only, chosen by figures of the steps before."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.errors import ScheduleError
from moeca_compile.schedule import Action, Partial, Schedule
from moeca_compile.schedule.adaptive import Adaptive
from tests.models import DiT

C, F = Action.COMPUTE, Action.FORECAST


def model(batch: int = 2) -> DiT:
    torch.manual_seed(0)
    return DiT(depth=1, dim=16, heads=2, num_experts=4, top_k=2, hidden=12, size=4, channels=2).eval()


def inputs(step: int, speeds: tuple[float, ...]) -> dict[str, Tensor]:
    """A latent for each speed, which turns by such an angle, faster and faster."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(1, 2, 4, 4, generator=generator) for _ in range(2))
    angles = [torch.tensor(speed * step**1.5) for speed in speeds]
    x = torch.cat([a * angle.cos() + b * angle.sin() for angle in angles])
    return {"x": x, "t": torch.full((len(speeds),), 900.0 - 20 * step), "y": torch.arange(len(speeds))}


def rows_of(schedule: Schedule | str, speeds: tuple[float, ...], steps: int = 14) -> tuple[str, list[Tensor]]:
    torch._dynamo.reset()
    compiled = moeca.compile(model().requires_grad_(False), schedule=schedule, inner="eager")
    with torch.no_grad(), warnings.catch_warnings(), moeca.trajectory(compiled, steps=steps):
        warnings.simplefilter("error")
        outputs = [compiled(**inputs(step, speeds)) for step in range(steps)]
    stats = moeca.stats(compiled)
    assert stats.graphs == 1
    return "".join(record.variant[1:] for record in stats.steps), outputs


@pytest.mark.slow
def test_a_faster_stream_is_computed_more_often() -> None:
    slow, fast = (rows_of("adaptive:0.3", (speed,))[0] for speed in (0.01, 0.2))
    assert slow.count("0") < fast.count("0")
    assert set(fast) == {"0", "1"}


@pytest.mark.slow
def test_the_worst_sample_decides() -> None:
    slow, fast, both = (rows_of("adaptive:0.3", speeds)[0] for speeds in ((0.01,), (0.2,), (0.2, 0.01)))
    assert both == fast != slow


def test_full_steps_are_exact() -> None:
    rows, outputs = rows_of("adaptive:0.02", (0.05,))
    reference = model()
    moeca.prepare(reference)
    for step, (row, found) in enumerate(zip(rows, outputs, strict=True)):
        wanted = reference(**inputs(step, (0.05,)))
        assert torch.allclose(found, wanted, atol=1e-5) is (row == "0"), step


@pytest.mark.slow
def test_three_rows_with_branches_between() -> None:
    """A dear step, one that computes attention and some branches, a cheap one."""
    keys = ("blocks.0", "blocks.0.moe")
    rows = ((C, C), (C, Partial(0, 0.25)), (F, Partial(0, 0)))
    schedule = Schedule(rows, keys, adaptive=Adaptive((0.1, 0.02)))
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert set(rows_of(schedule, (0.03,))[0]) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"adaptive": Adaptive((0.2, 0.1))}, "2 thresholds for 2 rows, one less is needed"),
        ({"adaptive": Adaptive((0.2,)), "period": 1}, "without timesteps and period"),
        ({"adaptive": Adaptive((0.2,)), "rows": ((C,), (C,))}, "its rows are different ones"),
    ],
)
def test_schedules_that_contradict_themselves(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        Schedule(**({"rows": ((C,), (F,))} | wrong))  # type: ignore[arg-type]


def test_unknown_entries_of_a_file() -> None:
    text = Schedule.by_drift(0.1).to_json().replace('"warmup"', '"warm"')
    with pytest.raises(ScheduleError, match=r"adaptive has unknown entries.*warm"):
        Schedule.from_json(text)
