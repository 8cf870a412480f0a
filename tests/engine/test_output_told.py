"""Output weights are told by `explain`, `stats`, the page and the facts of a schedule; unknown MACs aren't 0."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import moeca_compile as moeca
from moeca_compile.inspect.html.data import page_data
from moeca_compile.inspect.schedules import facts, table_of_facts
from moeca_compile.runtime.trajectory import Trajectory
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.output import OutputFacts
from tests.engine.test_output import WEIGHTS, Model, compiled, ruled

INPUTS = torch.zeros(2, 2, 3, 3), torch.full((2,), 1.0), torch.tensor([1, 2])
LINES = {
    "uncached": "output weights: fitted to uncached, at 2 computed and 1 cheap steps, of x, y0, y1, d0",
    "converged": "output weights: fitted to converged, at 2 computed and 1 cheap steps, of x, y0, y1, d0; corrects the "
    "solver too, so samples differ from the uncached ones",
    "given": "output weights: fitted to given samples, at 2 computed and 1 cheap steps, of x, y0, y1, d0; they bring "
    "samples nearer to these, so samples differ from the uncached ones",
}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def fitted_to(truth: str) -> Schedule:
    schedule = ruled(WEIGHTS)
    assert schedule.output is not None
    return replace(schedule, output=replace(schedule.output, truth=truth))


@pytest.mark.parametrize("truth", LINES)
def test_explain_and_stats_tell_what_weights_were_fitted_to(model: Model, truth: str) -> None:
    handle = compiled(model, fitted_to(truth))
    report = moeca.explain(handle, *INPUTS)
    assert LINES[truth] in str(report).splitlines()
    assert LINES[truth] in str(moeca.stats(handle)).splitlines()  # before any call, too
    told = {
        "truth": truth, "computed": 2, "cheap": 1, "terms": ["x", "y0", "y1", "d0"],
        "corrects_solver": truth != "uncached",
    }  # fmt: skip
    assert json.loads(report.to_json())["output_weights"] == told
    handle(*INPUTS)
    assert moeca.stats(handle).output_weights == moeca.explain(handle).output_weights == report.output_weights
    shown = page_data(report)["schedule"]["output_weights"]
    assert json.loads(json.dumps(shown)) == told | {"line": LINES[truth]}


def test_a_schedule_without_weights_tells_none(model: Model) -> None:
    handle = compiled(model, "uniform:3")
    report = moeca.explain(handle, *INPUTS)
    assert report.output_weights is moeca.stats(handle).output_weights is None
    assert "output weights" not in f"{report}{moeca.stats(handle)}"
    assert page_data(report)["schedule"]["output_weights"] is None


def test_facts_of_a_schedule_tell_them() -> None:
    said = facts(fitted_to("converged"))
    assert said["output_weights"]["truth"] == "converged"
    console = Console(width=200)
    with console.capture() as caught:
        console.print(table_of_facts(fitted_to("converged")))
    assert LINES["converged"].partition(": ")[2] in caught.get()
    assert facts(Schedule.uniform(3))["output_weights"] is None


def test_terms_that_nothing_weighs_are_not_told() -> None:
    rule = ruled(((1.0, 0.0, 0.0, 0.0),) + 3 * ((),)).output
    found = OutputFacts.of(rule, ruled(WEIGHTS).rows)
    assert found == OutputFacts("uncached", 1, 0, ("y0",), False)


def test_macs_that_are_not_known_are_not_zero(model: Model) -> None:
    """No graph is captured, so they aren't known before a call, nor after one; shares are."""
    schedule = Schedule.load(Path("benchmarks/results/schedules/digits_converged_20.json"))
    handle = compiled(model, replace(schedule, latent=(), timesteps=()))
    for inputs in (INPUTS, ()):
        report = moeca.explain(handle, *inputs)
        lines = str(report).splitlines()
        assert lines[0].startswith("1 graph(s), 0 nodes, MACs unknown (the model is called as it is), fingerprint ")
        rows = [line.split() for line in lines]
        assert ["v0", "10", "0", "100.0%"] in [row[:4] for row in rows]
        assert ["v1", "40", "0", "0.0%"] in [row[:4] for row in rows]
        assert next(row for row in rows if row[:2] == ["output", "span"])[4] == "100.0%"
        assert "at 10 computed and 40 cheap steps, of x, y0, " in str(report)
        data = page_data(report)
        assert [variant["share"] for variant in data["variants"]] == [1.0, 0.0]
        handle(*INPUTS)


def test_a_bundle_s_trajectory_tells_them() -> None:
    class Sessions:
        schedule = fitted_to("given")

    trajectory: Any = Trajectory.__new__(Trajectory)
    trajectory.session, trajectory._records, trajectory.state = Sessions(), [], None
    assert LINES["given"] in str(trajectory.stats()).splitlines()
