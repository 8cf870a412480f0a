"""What is held against the oracle: a model's captured graph, and its variants run as the dispatcher runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeca_compile.graph.capture import Capture, capture
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.lower import Executable, lower_eager
from moeca_compile.options import Options
from moeca_compile.passes.facts import Facts
from moeca_compile.pipeline import Analysis, analyze
from moeca_compile.runtime.driver import StepDriver
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Row, Schedule
from moeca_compile.schedule.forecast import polynomial
from tests.reference import Computed, Reference, forecast, number
from tests.tools import EAGER, build, layout_of, same, trace_module, with_casts


@dataclass(frozen=True)
class Subject:
    """A model with its captured graph, as the oracle runs it, and its analysis, from which variants are made.

    `inputs` gives a step's arguments by name; `args` are the other tensors of the graph: weights.
    """

    model: Callable[..., Any]
    inputs: Callable[[int], dict[str, Tensor]]
    captured: Capture
    analysis: Analysis
    args: tuple[Any, ...]

    @property
    def facts(self) -> Facts:
        return self.analysis.facts

    def call(self, step: int) -> list[Any]:
        """The arguments of a step, in the order of the captured graph."""
        given = self.inputs(step)
        return [given.get(one.label, arg) for one, arg in zip(self.captured.inputs, self.args, strict=True)]

    def eager(self, step: int) -> Tensor:
        with torch.no_grad():
            return self.model(**self.inputs(step))


def subject_of(
    model: Callable[..., Any], inputs: Callable[[int], dict[str, Tensor]], options: Options = EAGER
) -> Subject:
    """Traced and captured once: the oracle runs the captured graph as it is, the passes a copy."""
    traced = trace_module(model, *inputs(0).values())
    captured = capture(traced.gm, traced.args, traced.inputs)
    analysis = analyze(traced.gm, traced.args, traced.inputs, options, captured)
    return Subject(model, inputs, with_casts(captured), analysis, traced.args)


class Runner:
    """Runs rows through variants and `StreamState`, as the dispatcher does; variants are built once."""

    def __init__(self, one: Subject, schedule: Schedule) -> None:
        self.one, self.schedule = one, schedule
        self.layout = layout_of(one.analysis, schedule)
        self.driver = StepDriver(schedule, Warned())
        self.state = StreamState(self.layout, len(schedule.rows[0]))
        self.built: dict[Row, tuple[Variant, Executable]] = {}
        self.step = -1

    def start(self) -> None:
        self.step = -1
        self.state.clear()

    def variant(self, wanted: Row) -> tuple[Variant, Executable]:
        if wanted not in self.built:
            variant = build(self.one.analysis, self.schedule, wanted)
            self.built[wanted] = variant, lower_eager(variant)
        return self.built[wanted]

    def __call__(self, wanted: Row, args: Sequence[Any]) -> tuple[Tensor, ...]:
        self.step += 1
        variant, run = self.variant(wanted)
        assert wanted == self.schedule.rows[0] or self.state.last_step == self.step - 1
        given = [args[i] for i in variant.takes]
        for slot in variant.reads:
            one, kept = self.layout[slot], self.state.tensors[slot]
            given.append(torch.zeros(one.shape, dtype=getattr(torch, one.dtype)) if kept is None else kept)
        if variant.wants_now:
            given.append(torch.tensor(float(self.step + 1)))
        if variant.wants_coefficients:
            given.append(torch.tensor(self.driver.coefficients(self.state, self.step), dtype=torch.float32))
        with torch.no_grad():
            results = run(given)
        self.state.commit(self.step, wanted, variant.writes, results[variant.outputs :])
        return tuple(results[: variant.outputs])


def gathered(history: Sequence[Computed], step: int, order: int) -> Tensor:
    """The oracle's forecast as variants reckon it: w0 y0 + w1 y1 + w2 y2, in at least float32."""
    steps, values = zip(*history[: -(order + 2) : -1], strict=True)
    wide = torch.promote_types(values[0].dtype, torch.float32)
    weights = polynomial(step, steps)
    terms = [value.to(wide) * number(weight) for value, weight in zip(values, weights, strict=False)]
    return sum(terms[1:], terms[0]).to(values[0].dtype)


def assert_follows_the_oracle(one: Subject, runner: Runner, rows: Sequence[Row]) -> None:
    runner.start()
    plain, exact = (
        Reference(one.captured.gm, one.facts.regions, runner.schedule, form) for form in (forecast, gathered)
    )
    for step, wanted in enumerate(rows):
        args = one.call(step)
        found = runner(wanted, args)
        for left, right in zip(exact(wanted, args), found, strict=True):
            assert torch.isfinite(left).all()
            assert same(left, right), f"step {step}: {(left - right).abs().max()}"
        if found[0].dtype == torch.float64:
            torch.testing.assert_close(found, plain(wanted, args), rtol=1e-4, atol=1e-5)
