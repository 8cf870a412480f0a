"""What a calibration may cost is told once, before anything is sampled, and it costs no more.

In place of time counts what was computed, so that nothing depends on the machine.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.engine.variant_cache import VariantCache
from moeca_compile.graph.variant import Variant
from moeca_compile.planner import rollout
from moeca_compile.planner.price import price_of
from moeca_compile.planner.request import Request
from tests.curved_flow import STEPS, Velocity, guided
from tests.models import DiT
from tests.test_calibrate import sample

MOST = 40  # uncached trajectories for a share of the MACs, on the seeds that are taken by default
OF_OUTPUT: dict[str, Any] = {"granularity": "output", "inner": "eager"}


class Computed:
    """What was computed so far; in place of the module `time`."""

    amount = 0.0

    @classmethod
    def process_time(cls) -> float:
        return cls.amount


class CountedVelocity(Velocity):
    """Counts the rows that it computes."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        Computed.amount += len(x)
        return super().forward(x, t, y)


def computed() -> float:
    """All that was computed, in uncached trajectories of `guided`."""
    return Computed.amount / (8 * STEPS)


@pytest.fixture(autouse=True)
def counts_what_is_computed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(rollout, "time", Computed)
    monkeypatch.setattr(Computed, "amount", 0.0)
    caplog.set_level(logging.INFO, "moeca_compile")


def told(caplog: pytest.LogCaptureFixture) -> tuple[str, int, dict[str, int]]:
    """The line of the price, its bound, and its parts, which add up to that."""
    (line,) = (record.message for record in caplog.records if "uncached trajectories" in record.message)
    found = re.fullmatch(r"\w+: up to (\d+) uncached trajectories of .*?: (.*); more only where .*", line)
    assert found is not None
    parts = {name: int(cost) for cost, name in (part.split(" ", 1) for part in re.split(r", (?=\d)", found[2]))}
    assert sum(parts.values()) == int(found[1])
    return line, int(found[1]), parts


def test_a_quarter_of_the_steps_costs_at_most_40_trajectories_by_default(caplog: pytest.LogCaptureFixture) -> None:
    found = moeca.calibrate(CountedVelocity().eval(), guided, budget="macs:0.26", **OF_OUTPUT)
    line, bound, parts = told(caplog)
    assert line.startswith(f"calibrate: up to {bound} uncached trajectories of 4 seeds and 2 held-out ones: 7 to ")
    assert found.predicted["trajectories"] <= min(bound, MOST)
    assert "for the converged truth" not in parts
    assert found.predicted["trajectories"] == pytest.approx(computed(), abs=0.5)


def test_the_converged_truth_costs_six_more_for_each_seed_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    found = moeca.calibrate(CountedVelocity().eval(), guided, budget="macs:0.5", truth="converged", **OF_OUTPUT)
    _, bound, parts = told(caplog)
    assert parts["for the converged truth"] == 6 * (4 + 2) + 2  # held-out seeds are recorded again for it
    assert found.predicted["trajectories"] <= bound
    assert found.predicted["trajectories"] == pytest.approx(computed(), abs=0.5)


def test_a_front_is_told_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    front = moeca.calibrate_front(CountedVelocity().eval(), guided, budgets=["macs:0.26", "macs:0.5"], **OF_OUTPUT)
    line, bound, parts = told(caplog)
    assert line.startswith("calibrate_front: ")
    assert parts["to sample"] == 7  # once
    assert front.schedules[0].predicted["trajectories"] <= bound


def test_regions_cost_no_more_than_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    lowered = VariantCache._lowered

    def counting(cache: VariantCache, variant: Variant, args: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
        run = lowered(cache, variant, args)

        def counted(arguments: Sequence[Any]) -> Any:
            Computed.amount += variant.macs
            return run(arguments)

        return counted

    monkeypatch.setattr(VariantCache, "_lowered", counting)
    torch.manual_seed(0)
    found = moeca.calibrate(DiT(depth=1).eval(), sample, budget="macs:0.5", granularity="region", inner="eager")
    assert "for the stack" not in told(caplog)[2]
    assert 7 < found.predicted["trajectories"] <= min(told(caplog)[1], MOST)


def test_nothing_is_told_without_progress(caplog: pytest.LogCaptureFixture) -> None:
    moeca.calibrate(
        CountedVelocity().eval(), guided, budget="macs:0.26", progress=False, seeds=3, holdout=0, effort=0, **OF_OUTPUT
    )
    assert not [record for record in caplog.records if "uncached trajectories" in record.message]


def test_a_folder_and_further_work_are_told() -> None:
    price = price_of([request_of("psnr:40", branches=0.04)], "auto", "uncached", sample)
    assert "of 8 seeds, less what the folder has: 9 to sample, " in price.line("calibrate", True)
    assert {"for schedules with branches", "for the stack"} < set(price.parts)
    assert price_of([request_of("macs:0.5")], "region", "uncached", sample).total < price.total
    assert price_of([request_of("macs:0.5")], "output", {}, guided).parts["for the given truth"] == 8


def request_of(budget: str, branches: float = 0.0) -> Request:
    return Request.read(budget, "auto", 4, 8, 0, None, None, 2**30, None, 0, branches)
