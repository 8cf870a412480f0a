"""The summary of a first call: what it says, when it is logged, and where it goes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import moeca_compile as moeca
from moeca_compile.frontend import summary
from moeca_compile.graph.regions import Rejected
from moeca_compile.inspect import progress
from moeca_compile.inspect.summary import summary as summarized
from moeca_compile.schedule.checks import interval_for
from tests.docs import world


@pytest.fixture(autouse=True)
def unchanged_logger() -> Iterator[None]:
    before = progress.log.level
    progress.log.setLevel(logging.NOTSET)
    yield
    progress.log.setLevel(before)


def compiled(**options: Any) -> Any:
    return moeca.compile(world.model(), inner="eager", **({"schedule": "uniform:3"} | options))


def summaries(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "regions in one graph" in record.getMessage()]


def test_the_first_call_logs_one_summary(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moeca_compile")
    model = compiled()
    for seed in range(2):
        world.sample(model, seed)
    (text,) = summaries(caplog)
    report = moeca.explain(model)
    assert text.startswith("moeca_compile: DiT: 2 regions in one graph (1 attention, 1 experts)")
    share = report.variants[1].macs / report.variants[0].macs
    assert f"schedule uniform:3, order 1: v0 100.0%, v1 {share:.1%} of the MACs" in text
    assert f"{(1 + 2 * share) / 3:.1%} on average, {3 / (1 + 2 * share):.2f} times fewer" in text
    for name in ("stats(model)", "explain(model)", "compare(model, sample)", 'setLevel("WARNING")', "MiB a stream"):
        assert name in text
    world.sample(moeca.compile(model, schedule="uniform:2", inner="eager"))
    assert len(summaries(caplog)) == 2  # compiled anew


def test_rejected_candidates_are_in_it() -> None:
    report = moeca.explain(world.model(), *world_inputs(), inner="eager", schedule="full")
    many = tuple(Rejected(f"reason {number}") for number in range(5))
    text = summarized(replace(report, rejected=many), "M")
    assert "left alone: reason 2" in text
    assert "reason 3" not in text
    assert "and 2 more candidates left alone" in text


def world_inputs() -> Any:
    return torch.randn(3, 2, 4, 4), torch.full((3,), 900.0), torch.tensor([1, 2, 3])


@pytest.mark.slow
def test_warmup_and_explain_log_nothing_and_the_call_after_them_does(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moeca_compile")
    model = compiled()
    moeca.warmup(model, *world_inputs())
    moeca.explain(model, *world_inputs())
    assert not summaries(caplog)
    world.sample(model)
    assert len(summaries(caplog)) == 1


def test_a_model_s_output_has_a_summary_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moeca_compile")
    world.sample(compiled(granularity="output"))
    assert "DiT: 1 regions in one graph (1 span)" in summaries(caplog)[0]
    assert "v1 0.0% of the MACs; 33.3% on average, 3.00 times fewer" in summaries(caplog)[0]


@pytest.mark.slow
def test_without_any_logging_it_goes_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.log, "propagate", False)  # pytest's handlers are on the root
    world.sample(compiled())
    out, err = capsys.readouterr()
    assert "regions in one graph" in err
    assert out == ""
    progress.log.setLevel(logging.WARNING)
    world.sample(compiled())
    assert capsys.readouterr().err == ""


def test_logging_that_hides_it_costs_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "report_of", lambda programs: pytest.fail("a report was made"))
    progress.log.setLevel(logging.WARNING)
    world.sample(compiled())


# -- schedule="speedup:N" ---------------------------------------------------------------------------------------------


def test_a_speedup_becomes_the_shortest_interval_that_reaches_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moeca_compile")
    model = compiled(schedule="speedup:1.4")
    world.sample(model)
    report = moeca.explain(model)
    cheap = report.variants[1].macs / report.variants[0].macs
    interval = report.schedule.period
    assert report.schedule.made_by == f"speedup:1.4 as uniform:{interval}, order 1"
    assert interval / (1 + (interval - 1) * cheap) >= 0.95 * 1.4
    assert (interval - 1) / (1 + (interval - 2) * cheap) < 0.95 * 1.4
    assert f"speedup:1.4 as uniform:{interval}" in summaries(caplog)[0]
    assert moeca.Schedule.from_json(report.schedule.to_json()) == report.schedule


@pytest.mark.parametrize(
    ("speedup", "cheap", "interval"), [(2.0, 0.006, 2), (2.0, 0.0, 2), (2.0, 0.06, 3), (3.0, 0.02, 3), (2.0, 0.4, 5)]
)
def test_the_interval_for_a_speedup(speedup: float, cheap: float, interval: int) -> None:
    assert interval_for(speedup, cheap) == interval


def test_of_a_model_s_output_cheap_steps_are_free() -> None:
    model = compiled(schedule="speedup:2.5", granularity="output")
    world.sample(model)
    assert moeca.explain(model).schedule.period == 3


def test_a_speedup_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(moeca.MoecaError, match=r"speedup:9 can't be reached: .*uniform:10 gives \d\.\d\d.*calibrate"):
        world.sample(compiled(schedule="speedup:9"))


@pytest.mark.parametrize("text", ["speedup:1", "speedup:0.5", "speedup:", "speedup:x", "speedup:2:3"])
def test_speedups_that_are_none(text: str) -> None:
    with pytest.raises(moeca.MoecaError, match="speedup"):
        moeca.compile(world.model(), schedule=text)


def test_a_speedup_has_no_rows_to_save() -> None:
    with pytest.raises(moeca.MoecaError, match=r"speedup:2 has no rows to save.*explain\(model\)\.schedule"):
        moeca.Schedule.parse("speedup:2").to_json()
