"""From a module to what the package makes of it, step by step: Dynamo's graph, a Capture, an Analysis, variants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moeca_compile.graph.capture import Capture, Input, capture, inputs_of
from moeca_compile.graph.desugar import desugar
from moeca_compile.graph.fit import fit
from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.options import Options
from moeca_compile.passes.facts import Facts, RewriteRequest
from moeca_compile.passes.manager import PassManager
from moeca_compile.passes.transform.layout import state_layout
from moeca_compile.passes.transform.materialize_casts import materialize_casts
from moeca_compile.pipeline import FIND, NORMALIZE, Analysis, analyze, build_variant
from moeca_compile.schedule import Control, Partial, Row, Schedule
from moeca_compile.schedule.action import parse_row

UNHOISTED = ("hoist_step_only", "hoist_invariant")
EAGER = Options(inner="eager", disable=UNHOISTED)  # one program a row, with nothing beside it


@dataclass(frozen=True)
class Traced:
    """Dynamo's graph, the tensors of one call in the order of its placeholders, and what each of them is."""

    gm: GraphModule
    args: tuple[Any, ...]
    inputs: tuple[Input, ...]


def trace_calls(module: Any, *calls: tuple[Any, ...], dynamic: bool = False) -> list[Traced]:
    """What a backend gets for each call of `module`, as `backend.py` keeps it.

    No Dynamo state is left behind or found.
    """
    seen: list[Traced] = []

    def collect(gm: GraphModule, examples: list[Any]) -> Any:
        plain, flatten = desugar(gm, examples)
        known = inputs_of(plain, flatten(examples))

        def run(*args: Any) -> Any:
            seen.append(Traced(plain, tuple(flatten(args)), known))
            return gm(*args)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(module, backend=collect, fullgraph=True, dynamic=dynamic)
        for inputs in calls:
            compiled(*inputs)
    assert len(seen) == len(calls)
    return seen


def trace_module(module: Any, *inputs: Any) -> Traced:
    """What a backend gets for `module(*inputs)`."""
    (only,) = trace_calls(module, inputs)
    return only


def capture_module(module: Any, *inputs: Any) -> tuple[Capture, tuple[Any, ...]]:
    """The functional graph of `module(*inputs)`, its casts included, and the call's tensors."""
    traced = trace_module(module, *inputs)
    return with_casts(capture(traced.gm, traced.args, traced.inputs)), traced.args


def with_casts(captured: Capture) -> Capture:
    """The capture with the casts of its autocasts as nodes: what the oracle runs. No other pass has changed it."""
    facts = Facts(captured.inputs, autocast=captured.autocast)
    return replace(captured, gm=PassManager().rewrite([materialize_casts], captured.gm, facts), autocast=())


def analyze_module(module: Any, *inputs: Any, options: Options = EAGER) -> Analysis:
    """The normalized graph of `module(*inputs)` and all facts about it."""
    traced = trace_module(module, *inputs)
    return analyze(traced.gm, traced.args, traced.inputs, options)


def find_in(gm: GraphModule, inputs: tuple[Input, ...]) -> Facts:
    """All facts about a functional graph that is there already."""
    runner = PassManager()
    context = Facts(inputs)
    return runner.find(FIND, runner.rewrite(NORMALIZE, gm, context), context)


def row(text: str) -> Row:
    """`C`ompute, `R`euse, `F`orecast: one letter a region."""
    return parse_row(text, {})


def schedule_of(
    analysis: Analysis, *rows: str, order: int = 1, legend: Mapping[str, Partial] | None = None, control: Any = None
) -> Schedule:
    """A schedule fitted to the analysis' regions from rows like `CRF`; `legend` says what other letters mean."""
    regions = analysis.facts.regions
    acts = tuple(parse_row(text, legend or {}) for text in rows)
    return fit(Schedule(acts, regions.keys, order=order, control=control or Control()), regions)


def layout_of(analysis: Analysis, schedule: Schedule) -> tuple[StateSlot, ...]:
    """The state that a bound schedule keeps."""
    return state_layout(analysis.facts.regions, schedule)


def build(analysis: Analysis, schedule: Schedule, wanted: Row) -> Variant:
    """The program of one row of a bound schedule, named by its place among the distinct rows."""
    name = f"v{schedule.distinct_rows().index(wanted)}"
    return build_variant(analysis, schedule, wanted, EAGER, name)[0]


def variant_of(analysis: Analysis, text: str, order: int = 1, among: tuple[str, ...] = ()) -> Variant:
    """The program of one row, in a schedule of a full row, that row, and those `among` which it is."""
    full = "C" * len(analysis.facts.regions)
    return build(analysis, schedule_of(analysis, full, text, *among, order=order), row(text))


def with_row(analysis: Analysis, text: str) -> RewriteRequest:
    """What rewriters get for this row, without a layout."""
    return RewriteRequest(analysis.facts, row(text))


def node(gm: GraphModule, name: str) -> Node:
    """The node of this name; a KeyError where there is none."""
    return {one.name: one for one in gm.graph.nodes}[name]


def ops(gm: GraphModule) -> Counter[str]:
    """How often each operator is called, by its full name (`aten.linear.default`)."""
    return Counter(str(one.target) for one in gm.graph.nodes if one.op == "call_function")


def run_graph(gm: GraphModule, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Node by node."""
    with torch.no_grad():
        return tuple(torch.fx.Interpreter(gm).run(*args))


def same(left: Tensor, right: Tensor) -> bool:
    """Same dtype, same shape, same bits (but for the sign of a zero)."""
    return left.dtype == right.dtype and torch.equal(left, right)
