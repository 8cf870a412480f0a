"""`expert_thresholds`: from which drift on an expert comes first, measured on trajectories of the schedule itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import ScheduleError
from moeca_compile.schedule import Action, Control, Partial, Schedule
from tests.models import STYLES, DiT, NumpyMoE
from tests.test_calibrate import STEPS, sample

C, F = Action.COMPUTE, Action.FORECAST
KEYS, MOE = ("blocks.0", "blocks.0.moe"), "blocks.0.moe"
IDLE = 2


class Avoiding(NumpyMoE):
    """Nobody is routed to one of the experts."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x)
        return torch.where(ids == IDLE, 0, ids), weights


@pytest.fixture(scope="module")
def model() -> nn.Module:
    STYLES["avoiding"] = Avoiding
    torch.manual_seed(0)
    made = DiT("avoiding", depth=1)
    del STYLES["avoiding"]
    return made.eval().requires_grad_(False)


def schedule(score: str = "error", tau: float = 0.2) -> Schedule:
    between = (F, Partial(0, tau))
    return Schedule(((C, C), (C, C), between, between), KEYS, period=3, control=Control(score))


@pytest.fixture(scope="module", params=["error", pytest.param("drift", marks=pytest.mark.slow)])
def measured(model: nn.Module, request: pytest.FixtureRequest) -> dict[float, Schedule]:
    plain = schedule(request.param)
    return {share: moeca.expert_thresholds(model, sample, plain, share=share) for share in (0.1, 0.9)}


def test_a_larger_share_means_lower_thresholds(measured: dict[float, Schedule]) -> None:
    high, low = (measured[share].control.threshold[MOE] for share in (0.1, 0.9))
    assert len(high) == 4
    assert all(a > b > 0 for expert, (a, b) in enumerate(zip(high, low, strict=True)) if expert != IDLE)
    assert high[IDLE] == low[IDLE] == 0


def test_nothing_else_of_the_schedule_changes_and_it_can_be_kept(measured: dict[float, Schedule]) -> None:
    for one in measured.values():
        assert one.rows == schedule().rows
        assert Schedule.from_json(one.to_json()) == one
        again = Schedule(one.rows, KEYS, period=3, control=Control(one.control.score, threshold=one.control.threshold))
        assert again.control == one.control


@pytest.mark.slow
def test_thresholds_change_what_is_computed_and_not_how_much(model: nn.Module, measured: dict[float, Schedule]) -> None:
    score = measured[0.1].control.score
    samples, shares = [], set()
    for one in (schedule(score), measured[0.1]):
        torch._dynamo.reset()
        compiled = moeca.compile(model, schedule=one, inner="eager")
        with torch.no_grad(), moeca.trajectory(compiled, steps=STEPS):
            samples.append(sample(compiled, 5))
        shares.add(round(moeca.stats(compiled).mac_fraction, 9))
    assert len(shares) == 1
    assert not torch.equal(*samples)


def test_thresholds_that_were_there_are_measured_anew(model: nn.Module, measured: dict[float, Schedule]) -> None:
    again = moeca.expert_thresholds(model, sample, measured[0.9], share=0.1)
    assert again == measured[0.1]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"share": 0.0}, "a share between 0 and 1"),
        ({"share": 1.0}, "a share between 0 and 1"),
        ({"seeds": ()}, "and a seed"),
        ({"schedule": schedule(tau=0.0)}, r"no step of the schedule chose branches: give it rows with PARTIAL\(0, tau"),
    ],
)
def test_what_can_t_be_measured(model: nn.Module, wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        moeca.expert_thresholds(model, sample, **({"schedule": schedule()} | wrong))  # type: ignore[arg-type]
