"""`explain`: what it finds, what it prints, what it saves; and that it touches nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import CaptureError, OptionError, ScheduleError, StateError
from moeca_compile.graph.regions import Rejected
from moeca_compile.inspect.report import Report, VariantReport
from moeca_compile.pipeline import FIND, NORMALIZE, WITH_PROLOGUES
from moeca_compile.schedule import Schedule
from tests.docs import world
from tests.models import DiT
from tests.passes.blocks import Block, Routed, Stack, Timed, latent, times
from tests.sampling import compiled, dit, plain, run

KEYS = ("blocks.0", "blocks.0.moe", "blocks.1", "blocks.1.moe")
STATE = 2 * 4 * 16 * 4  # bytes of one region's output


def model() -> DiT:
    torch.manual_seed(0)
    return DiT(depth=2, dim=16, heads=2, num_experts=3, top_k=2, hidden=8, size=4, channels=2).eval()


def inputs(timestep: float = 500.0) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 2, 4, 4), torch.full((2,), timestep), torch.tensor([1, 2])


@cache
def report() -> Report:
    torch._dynamo.reset()
    return moeca.explain(model(), *inputs(), schedule="uniform:3", inner="eager")


@cache
def report_with_misses() -> Report:
    torch._dynamo.reset()
    body = Timed(Stack(Block("gate left", mlp=Routed()), around=True))
    return moeca.explain(body, latent(), times(), schedule="uniform:2", order=0, inner="eager")


# -- what it finds ----------------------------------------------------------------------------------------------------


def test_regions_are_those_of_the_model() -> None:
    assert tuple(region.key for region in report().regions) == KEYS
    assert [region.kind for region in report().regions] == ["attention", "experts"] * 2
    assert [region.layer for region in report().regions] == [0, 0, 1, 1]
    assert (report().graphs, report().timestep, report().latent) == (1, "t", "x")
    assert 0 < sum(region.macs for region in report().regions) < report().total_macs


def test_every_miss_has_its_reason_and_its_place() -> None:
    assert report().rejected == ()
    (miss,) = report_with_misses().rejected
    assert miss.reason == "a residual around 2 others: each of them is a region of its own"
    assert miss.where.startswith("blocks.py:")


def test_passes_are_all_that_ran_in_order() -> None:
    names = [name for name, *_ in report().passes]
    rewrite = [one.__name__ for one in WITH_PROLOGUES.rewrite]
    assert names == [one.__name__ for one in (*NORMALIZE, *FIND)] + [f"v{i} {name}" for i in (0, 1) for name in rewrite]
    assert all(ms > 0 and before > 0 and after > 0 for _, ms, before, after in report().passes)


def test_variants_are_the_distinct_rows() -> None:
    full, forecast = report().variants
    assert (full.name, full.rows, full.macs, full.reads, full.writes) == ("v0", 2, report().total_macs, 0, 4)
    regions = sum(region.macs for region in report().regions)
    assert (forecast.name, forecast.rows, forecast.macs) == ("v1", 2, report().total_macs - regions)
    assert (forecast.reads, forecast.writes) == (8, 0)
    assert forecast.nodes < full.nodes


def test_state_bytes_are_those_of_all_regions_and_outputs_kept() -> None:
    assert report().state_bytes == 4 * STATE * 2
    assert sum(region.state_bytes for region in report().regions) == 4 * STATE


def test_the_schedule_is_the_one_asked_for_bound_to_the_regions() -> None:
    assert report().schedule == Schedule.uniform(3).bind(KEYS, report().fingerprint, "region")


# -- what it prints and saves -----------------------------------------------------------------------------------------


def test_the_text_shows_regions_variants_and_passes() -> None:
    text = str(report())
    head, regions, hoisted, variants, passes = text.split("\n\n")
    assert hoisted.startswith("computed once a timestep: ")
    assert head.splitlines()[0].startswith(f"1 graph(s), {report().nodes} nodes, ")
    assert head.splitlines()[0].endswith(f"fingerprint {report().fingerprint}")
    assert head.splitlines()[1] == "timestep input: t, latent input: x"
    assert [line.split()[0] for line in regions.splitlines()] == ["region", *KEYS]
    assert regions.splitlines()[2].split()[1:4] == ["experts", "0", "2x4x16"]
    assert variants.splitlines()[0] == f"schedule uniform:3, order 1, {report().state_bytes} bytes of state a stream"
    assert [line.split()[0] for line in variants.splitlines()[1:]] == ["variant", "v0", "v1"]
    assert passes.startswith(f"{len(report().passes)} passes, ")
    assert "\n" not in passes


def test_the_text_shows_misses() -> None:
    (miss,) = report_with_misses().rejected
    assert f"left alone: {miss}" in str(report_with_misses()).splitlines()


def test_columns_stand_under_each_other() -> None:
    for section in str(report()).split("\n\n")[1:]:
        rows = [line for line in section.splitlines() if not line.startswith("schedule")]
        second = rows[0].index(rows[0].split()[1])
        assert all(row[second - 1] == " " != row[second] for row in rows)


def test_json_parses_and_holds_everything() -> None:
    data = json.loads(report_with_misses().to_json())
    assert set(data) == set(Report.__dataclass_fields__)
    assert [one["key"] for one in data["regions"]] == [one.key for one in report_with_misses().regions]
    assert data["rejected"][0]["reason"] == report_with_misses().rejected[0].reason
    assert data["variants"][1]["name"] == "v1"
    assert data["passes"][0][0] == "materialize_casts"
    assert data["total_macs"] == report_with_misses().total_macs


def test_the_schedule_in_the_json_is_a_schedule() -> None:
    data = json.loads(report().to_json())
    assert Schedule.from_json(json.dumps(data["schedule"])) == report().schedule


def test_a_report_of_nothing_prints() -> None:
    empty = replace(report(), regions=(), rejected=(), total_macs=0, timestep="", latent="", variants=())
    text = str(empty)
    assert "timestep input: not found, latent input: not found" in text
    assert "left alone" not in text


def test_shares_of_a_model_without_macs_are_zero() -> None:
    free = replace(report(), total_macs=0, variants=(VariantReport("v0", 1, 5, 0, 0, 0),))
    assert "v0       1     5      0.0%" in str(free)


def test_all_outputs_of_a_region_are_shown() -> None:
    region = report().regions[0]
    cuts = [replace(region.cuts[0], shape=shape) for shape in ((2, 4, 16), (2, 3, 16))]
    both = replace(region, cuts=tuple(cuts))
    assert " 2x4x16 2x3x16 " in str(replace(report(), regions=(both,)))


def test_a_miss_without_a_place_prints() -> None:
    assert "left alone: too odd" in str(replace(report(), rejected=(Rejected("too odd"),)))


# -- how it is asked --------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_explained_with_its_own_options() -> None:
    torch._dynamo.reset()
    compiled = moeca.compile(model(), schedule="uniform:4", order=2, inner="eager")
    with torch.no_grad():
        expected = compiled(*(one := inputs()))
        found = moeca.explain(compiled, *one)
        assert found.schedule.made_by == "uniform:4, order 2"
        assert moeca.explain(compiled, *one, schedule="uniform:5").schedule.made_by == "uniform:5, order 2"
        moeca.reset(compiled)
        assert torch.equal(compiled(*one), expected)


def test_without_inputs_the_last_call_is_explained() -> None:
    model = compiled(dit(), schedule="uniform:3")
    with pytest.raises(StateError, match=r"no call of the compiled model was made yet. Run it once, then explain it;"):
        moeca.explain(model)
    run(plain(model))
    inputs = torch.randn(2, 4, 8, 8), torch.full((2,), 900.0), torch.tensor([1, 2])
    now, then = moeca.explain(model), moeca.explain(model, *inputs)
    assert (now.regions, now.schedule, now.variants) == (then.regions, then.schedule, then.variants)
    with pytest.raises(StateError, match="options are explained for inputs"):
        moeca.explain(model, schedule="uniform:5")


def test_of_a_plain_model_without_inputs_it_says_what_to_do() -> None:
    pipe = world.Pipeline()
    with pytest.raises(StateError, match=r"this DiT isn't compiled with moeca, so there is no call.*run it once"):
        moeca.explain(pipe)
    other = torch.compile(world.model(), backend="eager")
    with pytest.raises(StateError, match=r"isn't compiled with moeca, so there is no call to explain"):
        moeca.explain(other)
    moeca.compile(pipe, schedule="uniform:3", inner="eager")
    with pytest.raises(StateError, match=r"Run it once, then explain it; or pass inputs.*explain\(model, \*inputs\)"):
        moeca.explain(pipe)
    pipe()
    assert moeca.explain(pipe).regions


@pytest.mark.slow
def test_explaining_leaves_the_cached_state_alone() -> None:
    torch._dynamo.reset()
    compiled = moeca.compile(model(), schedule="uniform:3", inner="eager")
    with torch.no_grad(), moeca.trajectory(compiled, steps=3):
        compiled(*inputs())
        before = moeca.stats(compiled)
        moeca.explain(compiled, *inputs())
        assert moeca.stats(compiled).steps == before.steps
        assert moeca.stats(compiled).state_bytes == before.state_bytes > 0
        compiled(*inputs(450.0))
    assert [record.step for record in moeca.stats(compiled).steps] == [0, 1]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"shedule": "full"}, OptionError, "did you mean 'schedule'"),
        ({"schedule": "unifrom:3"}, ScheduleError, "is not understood"),
        (
            {"schedule": Schedule.uniform(2).bind(("elsewhere",), "")},
            ScheduleError,
            r"not in the model: \['elsewhere'\]",
        ),
    ],
)
def test_what_cannot_be_explained_is_refused_with_the_reason(
    given: dict[str, object], error: type[Exception], text: str
) -> None:
    torch._dynamo.reset()
    with pytest.raises(error, match=text):
        moeca.explain(model(), *inputs(), inner="eager", **given)  # type: ignore[arg-type]


def test_a_model_with_nothing_to_cache_is_refused_with_its_near_misses() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1)

    torch._dynamo.reset()
    with pytest.raises(CaptureError, match=r"nothing to cache was found.*no residual add around a matmul.*'full'"):
        moeca.explain(Sum(), latent(), inner="eager")


def test_a_model_with_nothing_to_cache_is_explained_uncached() -> None:
    torch._dynamo.reset()
    found = moeca.explain(nn.Linear(8, 8), latent(), schedule="full", inner="eager")
    assert (found.regions, found.state_bytes, len(found.variants)) == ((), 0, 1)
    assert "schedule full" in str(found)
