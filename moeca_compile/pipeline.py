"""THE PAGE: every stage and every pass, in order.

    prepare -> capture -> find -> (measure -> plan) -> rewrite -> lower -> run

`prepare` is `expert_dispatch/`, capture is `graph/capture.py`, a plan is a `Schedule`, run is `engine/`. What lies
between is here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from moeca_compile.errors import OptionError
from moeca_compile.graph import fx
from moeca_compile.graph.capture import Capture, Input, capture
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.fold_linear import fold_linear
from moeca_compile.lowering.inductor.repeat_blocks import repeat_blocks
from moeca_compile.options import Options
from moeca_compile.passes.analysis.count_macs import count_macs, node_macs
from moeca_compile.passes.analysis.find_attention import find_attention
from moeca_compile.passes.analysis.find_experts import find_experts
from moeca_compile.passes.analysis.find_hoisted import find_hoisted
from moeca_compile.passes.analysis.find_inputs import find_inputs
from moeca_compile.passes.analysis.find_regions import find_regions
from moeca_compile.passes.analysis.find_residuals import find_residuals
from moeca_compile.passes.analysis.find_routers import find_routers
from moeca_compile.passes.analysis.find_signal import find_signal
from moeca_compile.passes.analysis.find_spans import find_spans
from moeca_compile.passes.context import Context
from moeca_compile.passes.manager import Finder, PassRecord, Rewriter, Runner
from moeca_compile.passes.partial.find_tokens import find_tokens
from moeca_compile.passes.registry import is_registered, with_registered
from moeca_compile.passes.transform.drop_dead import drop_dead
from moeca_compile.passes.transform.drop_noops import drop_noops
from moeca_compile.passes.transform.hoist import hand_out, hoist_invariant, hoist_step_only, name_of
from moeca_compile.passes.transform.insert_state import insert_state
from moeca_compile.passes.transform.layout import state_layout
from moeca_compile.passes.transform.plain_einsum import plain_einsum
from moeca_compile.passes.transform.ports import COEFFICIENTS, NOW
from moeca_compile.passes.transform.separate_rows import separate_rows
from moeca_compile.passes.transform.tag_row import tag_row
from moeca_compile.passes.transform.verify_variant import verify_variant
from moeca_compile.schedule import Row, Schedule
from moeca_compile.schedule.granularity import Granularity

NORMALISE: tuple[Rewriter, ...] = (
    drop_noops,  # assertions, detach, dropout: nothing may stand between a residual and its branch
    plain_einsum,  # an einsum that sums nothing is no matmul
    separate_rows,  # text tokens that are packed beside the latent's don't depend on it
)

FIND: tuple[Finder, ...] = (
    find_inputs,  # timestep, latent, condition; what depends on what
    find_attention,  # anchors: SDPA, softmax(QK^T)V
    find_routers,  # anchors: choices of the largest scores, and what they steer
    find_experts,  # anchors: moeca::experts, each with its router
    find_residuals,  # x + gate * branch(x), cut before the gate
    count_macs,  # what each node costs
    find_regions,  # NOTE: after those above, it joins their facts
    find_spans,  # NOTE: after find_regions; one span of blocks in place of its regions, where the options ask for it
    find_tokens,  # NOTE: after find_spans; which regions can be recomputed in part
    find_signal,  # NOTE: after find_tokens; what an adaptive schedule watches
    find_hoisted,  # what doesn't change with the latent
)

REWRITE: tuple[Rewriter, ...] = (
    tag_row,  # decide: one mark per region output
    insert_state,  # act: read, extrapolate, write state
    drop_dead,  # NOTE: after insert_state; only now are the skipped regions dead
    hoist_step_only,  # NOTE: after drop_dead; what depends on the timestep and not on the latent comes in from outside
    hoist_invariant,  # NOTE: after hoist_step_only; and what is left that stays the same in a trajectory
    verify_variant,  # NOTE: last; lowering must get what the row promises
)

PROLOGUE: dict[str, tuple[Rewriter, ...]] = {  # how the hoisted values are computed, by their level
    "invariant": (hand_out, drop_dead),
    "step": (hand_out, drop_dead, hoist_invariant),
}

HOIST: tuple[Rewriter, ...] = (hoist_step_only, hoist_invariant)
LOWER = (  # on the way to Inductor
    fold_linear,  # a linear over a slice of the channels is one product
    repeat_blocks,  # NOTE: last; equal blocks are compiled once
)

# may be disabled: results stay right without them
OPTIONAL = frozenset(one.__name__ for one in (*NORMALISE, *HOIST, *LOWER))


@dataclass(frozen=True)
class Analysis:
    """One captured graph and all facts about it."""

    gm: GraphModule
    context: Context
    records: tuple[PassRecord, ...]


def analyse(
    gm: GraphModule, args: Sequence[Any], inputs: Sequence[Input], options: Options, captured: Capture | None = None
) -> Analysis:
    """capture (unless `captured`) -> find, for the shapes and dtypes of `args`.

    Raises:
        CaptureError: the graph can't be made functional.
        OptionError: `disable` names a pass that doesn't exist or can't be left out.
    """
    runner = _runner(options)
    captured = captured or capture(gm, args, inputs)
    context = Context(captured.inputs, Granularity.parse(options.granularity))
    first = replace(context, indices=_indices(captured.inputs, inputs, args))
    normal = runner.rewrite(with_registered("normalize", NORMALISE), captured.gm, first)
    context = runner.find(with_registered("find", FIND), normal, context)
    return Analysis(normal, context, tuple(runner.records))


_INDICES = (torch.bool, torch.int32, torch.int64)


def _indices(captured: Sequence[Input], inputs: Sequence[Input], args: Sequence[Any]) -> dict[str, Tensor]:
    given = {one.label: arg for one, arg in zip(inputs, args, strict=True) if not one.is_weight}
    found = {one.name: given.get(one.label) for one in captured}
    return {
        name: arg
        for name, arg in found.items()
        if type(arg) is Tensor and arg.dim() == 1 and arg.dtype in _INDICES and not arg.is_meta
    }


def build_variant(
    analysis: Analysis, schedule: Schedule, row: Row, options: Options, name: str
) -> tuple[Variant, tuple[PassRecord, ...]]:
    """rewrite: the program of one row, among others that keep the state of `schedule`, fitted to these regions.

    A schedule that keeps nothing hoists nothing either: each call's results are those of its own inputs and weights,
    whatever was written to between calls, and nobody has to look.
    """
    layout = state_layout(analysis.context.regions, schedule)
    context = replace(analysis.context, row=row, layout=layout, order=schedule.order, control=schedule.control)
    runner = _runner(options)
    passes = [one for one in with_registered("rewrite", REWRITE) if layout or one not in HOIST]
    gm = runner.rewrite(passes, analysis.gm, context, label=f"{name} ")
    return _variant(name, gm, context), tuple(runner.records)


def build_prologue(
    analysis: Analysis, gives: tuple[int, ...], options: Options, name: str
) -> tuple[Variant, tuple[PassRecord, ...]]:
    """The program of these hoisted values (positions in the context's list, all of one level)."""
    (level,) = {analysis.context.hoisted[position].level for position in gives}
    context = replace(analysis.context, gives=gives)
    runner = _runner(options)
    gm = runner.rewrite(PROLOGUE[level], analysis.gm, context, label=f"{name} ")
    return _variant(name, gm, context), tuple(runner.records)


def _variant(name: str, gm: GraphModule, context: Context) -> Variant:
    layout = context.layout
    positions = {one.name: i for i, one in enumerate(context.inputs)}
    hoisted = {name_of(i): i for i in range(len(context.hoisted))}
    slots = {slot.name: i for i, slot in enumerate(layout)}
    names = [node.name for node in fx.placeholders(gm)]
    writes = tuple(slots[name] for name in gm.meta.get("moeca_writes", ()))
    return Variant(
        name=name,
        row=context.row,
        gm=_in_order(gm, [*positions, *hoisted, *slots, NOW, COEFFICIENTS]),
        takes=tuple(sorted(positions[name] for name in names if name in positions)),
        hoists=tuple(sorted(hoisted[name] for name in names if name in hoisted)),
        reads=tuple(sorted(slots[name] for name in names if name in slots)),
        writes=writes,
        wants_coefficients=COEFFICIENTS in names,
        wants_now=NOW in names,
        outputs=len(fx.output_node(gm).args[0]) - len(writes),  # type: ignore[arg-type]
        macs=sum(map(node_macs, gm.graph.nodes)) + gm.meta.get("moeca_hoisted_macs", 0),
        node_count=len(gm.graph.nodes),
    )


def _in_order(gm: GraphModule, order: list[str]) -> GraphModule:
    """Placeholders in one order for every variant: the model's inputs, the state, the clock."""
    rank = {name: i for i, name in enumerate(order)}
    body = next(node for node in gm.graph.nodes if node.op != "placeholder")
    for node in sorted(fx.placeholders(gm), key=lambda node: rank[node.name]):
        body.prepend(node)
    gm.graph.lint()
    gm.recompile()
    return gm


def _runner(options: Options) -> Runner:
    fixed = [name for name in options.disable if name not in OPTIONAL and not is_registered(name)]
    if fixed:
        raise OptionError(f"disable={fixed}: only {sorted(OPTIONAL)} can be left out")
    folder = options.dump or os.environ.get("MOECA_DUMP")
    return Runner(Path(folder) if folder else None, options.disable)
