"""Variants against the oracle, step by step.

In float64 they follow the oracle as it stands, but for the rounding of float32 distances. In every dtype they follow it
bit by bit when it reckons forecasts in the order that the variants do: the interpreter runs both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.graph.variant import SLOTS
from moeca_compile.schedule import Action
from moeca_compile.schedule.fitted import FittedWeights
from tests.following import Runner, Subject, assert_follows_the_oracle, gathered, subject_of
from tests.models import DiT
from tests.passes.blocks import DIM, Block, OneStream, Routed, Stack, Timed, TwoStreams
from tests.reference import Reference, forecast
from tests.tools import build, layout_of, ops, row, run_graph, same, schedule_of

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
EACH_DTYPE = (pytest.param("float64", marks=pytest.mark.slow), "float32", "bfloat16")
NO_DEADLINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ANCHORS = {"attention": "aten.scaled_dot_product_attention.default", "experts": "moeca.experts.default"}


# steps that were computed, how far ahead to forecast, the order, and a seed for the values
PASTS: dict[str, st.SearchStrategy[Any]] = {
    "steps": st.lists(st.integers(0, 30), min_size=1, max_size=5, unique=True).map(sorted),
    "ahead": st.integers(1, 5),
    "order": st.integers(0, 2),
    "seed": st.integers(0, 99),
}


def small(dtype: str = "float64", depth: int = 2) -> DiT:
    torch.manual_seed(0)
    model = DiT(depth=depth, dim=16, heads=2, num_experts=4, top_k=2, hidden=12, size=4, channels=2)
    return model.to(DTYPES[dtype]).eval().requires_grad_(False)


def inputs(step: int, dtype: str = "float64") -> dict[str, Tensor]:
    """Neighbouring steps are alike, as in sampling."""
    generator = torch.Generator().manual_seed(7)
    x, drift = (torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x + 0.2 * step * drift + 0.02 * step**2 * drift.sin()
    return {"x": x.to(DTYPES[dtype]), "t": torch.full((2,), 900.0 - 40 * step), "y": torch.tensor([1, 5])}


@cache
def subject(dtype: str = "float64", depth: int = 2) -> Subject:
    model = small(dtype, depth)
    moeca.prepare(model)
    return subject_of(model, partial(inputs, dtype=dtype))


def random_rows(width: int, order: int, max_steps: int = 8) -> st.SearchStrategy[list[str]]:
    """Rows over `width` regions; the first computes everything."""
    later = st.lists(st.text("CRF" if order else "CR", min_size=width, max_size=width), max_size=max_steps - 1)
    return later.map(lambda texts: ["C" * width, *texts])


# -- the oracle itself ------------------------------------------------------------------------------------------------


@settings(NO_DEADLINE)
@given(**PASTS)
def test_the_oracle_s_forecast_is_the_polynomial_through_the_last_values(
    steps: list[int], ahead: int, order: int, seed: int
) -> None:
    values = torch.randn(len(steps), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    used = min(order + 1, len(steps))
    at = np.array(steps[-used:]) - steps[-1]
    powers = np.vander(at, used)
    expected = np.vander([ahead], used) @ np.linalg.solve(powers, values[-used:].numpy())
    found = forecast(list(zip(steps, values, strict=True)), steps[-1] + ahead, order)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(NO_DEADLINE, max_examples=50)
@given(**PASTS)
def test_a_forecast_gathered_by_differences_is_the_oracle_s(
    dtype: str, steps: list[int], ahead: int, order: int, seed: int
) -> None:
    values = torch.randn(len(steps), 64, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])
    history = list(zip(steps, values, strict=True))
    left, right = (form(history, steps[-1] + ahead, order) for form in (forecast, gathered))
    torch.testing.assert_close(left, right, rtol=0.008 if dtype == "bfloat16" else 1e-5, atol=1e-4)


def test_the_oracle_s_forecast_is_rounded_once() -> None:
    """bfloat16 values are extrapolated in float32: differences of neighbouring steps would cancel."""
    values = [(0, torch.tensor([1.0, 100.0]).bfloat16()), (1, torch.tensor([1.0078125, 100.5]).bfloat16())]
    assert forecast(values, 4, 1).tolist() == [1.03125, 102.0]


@pytest.mark.slow
def test_the_oracle_computes_everything_at_a_full_row() -> None:
    one = subject("float32")
    oracle = Reference(one.captured.gm, one.facts.regions, schedule_of(one.analysis, "CCCC"))
    assert same(oracle(row("CCCC"), one.call(0))[0], one.eager(0))


# -- variants follow the oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EACH_DTYPE)
@settings(NO_DEADLINE, max_examples=6)
@given(data=st.data(), order=st.integers(0, 2))
def test_any_schedule_is_run_as_the_oracle_says(dtype: str, data: st.DataObject, order: int) -> None:
    one = subject(dtype)
    texts = data.draw(random_rows(len(one.facts.regions), order))
    schedule = schedule_of(one.analysis, *texts, order=order)
    runner = Runner(one, schedule)
    assert_follows_the_oracle(one, runner, schedule.rows)
    assert len(runner.built) == len(schedule.distinct_rows())
    for slot, kept in zip(runner.layout, runner.state.tensors, strict=True):
        if kept is None:
            assert len(runner.state.history[slot.region]) <= SLOTS.index(slot.slot)
            continue
        assert (kept.shape, str(kept.dtype), kept.nbytes) == (slot.shape, f"torch.{slot.dtype}", slot.bytes)


@pytest.mark.parametrize("dtype", EACH_DTYPE)
@settings(NO_DEADLINE, max_examples=6)
@given(data=st.data(), order=st.integers(1, 2))
def test_fitted_weights_are_run_as_the_oracle_says(dtype: str, data: st.DataObject, order: int) -> None:
    one = subject(dtype)
    schedule = schedule_of(one.analysis, *data.draw(random_rows(len(one.facts.regions), order)), order=order)
    computed, weights = [0] * len(one.facts.regions), []
    for acts in schedule.rows:
        counts = [min(count, 4) if act is Action.FORECAST else 0 for act, count in zip(acts, computed, strict=True)]
        floats = st.floats(-2, 2, width=32)
        weights.append(tuple(tuple(data.draw(st.lists(floats, max_size=count))) for count in counts))
        computed = [count + (act is Action.COMPUTE) for act, count in zip(acts, computed, strict=True)]
    fitted = replace(schedule, fitted=FittedWeights(tuple(weights)))
    assert_follows_the_oracle(one, Runner(one, fitted), fitted.rows)


@cache
def every_row(dtype: str, order: int) -> Runner:
    """All rows that two regions can have, in one schedule."""
    one = subject(dtype, depth=1)
    letters = "CRF" if order else "CR"
    return Runner(one, schedule_of(one.analysis, *map("".join, product(letters, repeat=2)), order=order))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", EACH_DTYPE)
@settings(NO_DEADLINE, max_examples=8)
@given(data=st.data())
def test_once_everything_was_computed_any_variant_may_follow_any_other(
    dtype: str, order: int, data: st.DataObject
) -> None:
    runner = every_row(dtype, order)
    rows = data.draw(st.lists(st.sampled_from(runner.schedule.rows), max_size=20))
    assert_follows_the_oracle(runner.one, runner, [runner.schedule.rows[0], *rows])


@pytest.mark.parametrize("order", [1, 2])
def test_a_forecast_is_exact_where_the_region_moves_along_a_polynomial(order: int) -> None:
    """The region is linear and its input a polynomial of the step: extrapolated and computed are the same."""
    weight = torch.randn(6, 6, dtype=torch.float64)
    base = torch.randn(3, 2, 6, dtype=torch.float64)

    def at(step: int) -> dict[str, Tensor]:
        return {"x": base[0] + 0.1 * step * base[1] + (0.01 * step**2 * base[2] if order == 2 else 0.0)}

    one = subject_of(lambda x: (x + x @ weight).tanh(), at)
    runner = Runner(one, schedule_of(one.analysis, "C", "F", order=order))
    for step, letter in enumerate("CCCFFFCFF"):
        (found,) = runner(row(letter), one.call(step))
        torch.testing.assert_close(found, one.eager(step), rtol=1e-5, atol=1e-5)


W = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3)) / 4


def reads_another(x: Tensor, t: Tensor) -> Tensor:
    a = (x @ W).tanh()
    return x + a + (a @ W).tanh() * t.cos().sum()


def joins_twice(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    h = (x @ W).tanh() @ W
    return x + h, x + t.cos().sum() * h


def returns_its_branch(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    h = (x @ W).tanh() @ W
    return x + h, h


def turned(x: Tensor, t: Tensor) -> Tensor:
    return x + (x.mT @ W[:4, :4]).mT * t.cos().sum()


ARCHITECTURES: dict[str, Callable[[], Callable[..., Any]]] = {
    "two streams share an attention": lambda: Timed(Stack(TwoStreams(), Block("gate left"))),
    "one linear in and out": lambda: Timed(Stack(OneStream(), OneStream())),
    "parallel, routed": lambda: Timed(Block("parallel, gated", mlp=Routed())),
    "attention and experts in one branch": lambda: Timed(Block("parallel, one sum", mlp=Routed())),
    "a residual around blocks": lambda: Timed(Stack(Block("gate left"), Block("post norm"), around=True)),
    "a branch reads another": lambda: reads_another,
    "a branch joins twice": lambda: joins_twice,
    "a branch is an output": lambda: returns_its_branch,
    "a region is not contiguous": lambda: turned,
}


def slowly(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, drift = (torch.randn(2, 4, DIM, generator=generator) for _ in range(2))
    return {"x": x + 0.1 * step * drift, "t": torch.full((2,), 3.0 - 0.1 * step)}


AUTOCAST = ("two streams share an attention", "parallel, routed", "a branch is an output", "a region is not contiguous")
CASES = [(name, False) for name in ARCHITECTURES] + [(name, True) for name in AUTOCAST]


@pytest.mark.parametrize(("name", "autocast"), CASES)
def test_every_architecture_follows_the_oracle(name: str, autocast: bool) -> None:
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one = subject_of(ARCHITECTURES[name](), slowly)
    width = len(one.facts.regions)
    assert width > 0
    turns = ["C", "C", "CF", "FC", "F", "C", "R", "FR", "CFF", "F"]
    texts = [(turn * width)[:width] for turn in turns]
    runner = Runner(one, schedule_of(one.analysis, *texts, order=2))
    assert_follows_the_oracle(one, runner, runner.schedule.rows)


# -- exact first ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_all_compute_schedule_is_bitwise_the_captured_graph(dtype: str) -> None:
    one = subject(dtype)
    runner = Runner(one, schedule_of(one.analysis, "CCCC", order=0))
    assert runner.layout == ()
    for step in range(3):
        (found,) = runner(row("CCCC"), one.call(step))
        assert same(found, run_graph(one.captured.gm, tuple(one.call(step)))[0])
        assert same(found, one.eager(step))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_row_among_cached_ones_is_bitwise_the_captured_graph(dtype: str, order: int) -> None:
    runner = every_row(dtype, order)
    runner.start()
    other = runner.schedule.rows[-1]
    for step, full in enumerate([True, False, True, True, False, False, True]):
        args = runner.one.call(step)
        (found,) = runner(runner.schedule.rows[0] if full else other, args)
        exact = same(found, run_graph(runner.one.captured.gm, tuple(args))[0])
        assert exact is full


def test_what_a_variant_returns_is_not_what_it_keeps() -> None:
    """Outputs changed in place by the caller leave the state as it was."""
    one = subject("float32")
    schedule = schedule_of(one.analysis, "CCCC", "FFFF")
    touched, untouched = Runner(one, schedule), Runner(one, schedule)
    for step, wanted in enumerate([*schedule.rows, *schedule.rows]):
        found, expected = touched(wanted, one.call(step)), untouched(wanted, one.call(step))
        assert same(found[0], expected[0])
        found[0].fill_(float("nan"))


# -- what runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["CCCC", "CRCF", "FCRC", "RRFC", "FFFF", "RRRR"])
def test_a_variant_holds_the_operators_of_its_computed_regions_and_no_others(text: str) -> None:
    one = subject()
    variant = build(one.analysis, schedule_of(one.analysis, "CCCC", text), row(text))
    count = ops(variant.gm)
    for kind, operator in ANCHORS.items():
        computed = [a for region, a in zip(one.facts.regions, row(text), strict=True) if region.kind == kind]
        assert count[operator] == computed.count(Action.COMPUTE)
    skipped = sum(
        region.macs for region, a in zip(one.facts.regions, row(text), strict=True) if a is not Action.COMPUTE
    )
    assert variant.macs == one.facts.regions.total_macs - skipped


def test_the_model_under_test_is_what_the_tests_say() -> None:
    one = subject()
    assert [region.kind for region in one.facts.regions] == ["attention", "experts"] * 2
    assert one.facts.rejected == ()
    assert ops(one.captured.gm)["moeca.experts.default"] == 2


# -- through the front door -------------------------------------------------------------------------------------------


COPIES = ("CCCC", "RRRR", "CRCR", "CCCC", "RCRC", "RRRR")
LINES = ("CCCC", "FFFF", "CFRC", "CCCC", "FFFF", "RRFF", "FFFF")
PARABOLAS = ("CCCC", "CCCC", "CFCF", "CCCC", "FFFF", "FFFF", "CRFC", "FFFF")


@pytest.mark.parametrize(
    ("dtype", "order", "texts"),
    [
        ("float32", 0, COPIES),
        pytest.param("float64", 1, LINES, marks=pytest.mark.slow),
        ("bfloat16", 1, LINES),
        pytest.param("float64", 2, PARABOLAS, marks=pytest.mark.slow),
        ("float32", 2, PARABOLAS),
    ],
)
def test_the_compiled_model_in_a_trajectory_is_what_the_oracle_says(
    dtype: str, order: int, texts: tuple[str, ...]
) -> None:
    one = subject(dtype)
    schedule = schedule_of(one.analysis, *texts, order=order)
    torch._dynamo.reset()
    model = moeca.compile(small(dtype), schedule=schedule, inner="eager")
    oracle = Reference(one.captured.gm, one.facts.regions, schedule, gathered)
    with torch.no_grad(), moeca.trajectory(model, steps=len(texts)):
        for step, wanted in enumerate(schedule.rows):
            found = model(**inputs(step, dtype))
            assert same(found, oracle(wanted, one.call(step))[0]), f"step {step}"
    stats = moeca.stats(model)
    assert len({record.variant for record in stats.steps}) == len(schedule.distinct_rows())
    assert stats.state_bytes == sum(slot.bytes for slot in layout_of(one.analysis, schedule))
    assert stats.graphs == 1
    executed = sum(record.macs for record in stats.steps)
    assert stats.mac_fraction == executed / (one.facts.regions.total_macs * len(texts)) < 1
