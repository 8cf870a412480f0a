"""THE PAGE: every stage and every pass, in order.

    prepare -> capture -> normalize -> find -> (measure -> plan) -> rewrite -> lower -> run

`prepare` is `expert_dispatch/`, capture is `graph/capture.py`, a plan is a `Schedule`, run is `engine/`. What lies
between is here. A pass takes a graph and what its stage knows beside it, and gives the graph; a finder gives facts.
`passes/manager.py` runs them all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from moeca_compile.errors import OptionError
from moeca_compile.graph import fx
from moeca_compile.graph.capture import Capture, Input, capture
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.fold_linear import fold_linear
from moeca_compile.lowering.inductor.lower import AtOtherSize, Executable, lower_inductor
from moeca_compile.lowering.inductor.native import write_native
from moeca_compile.lowering.inductor.repeat_blocks import repeat_blocks
from moeca_compile.lowering.inductor.sizes.shared import SharedSizes
from moeca_compile.lowering.inductor.split_table import split_table
from moeca_compile.lowering.inductor.straight_stream import straight_stream
from moeca_compile.lowering.inductor.weight_addresses import weight_addresses
from moeca_compile.lowering.onnx.batch import any_batch
from moeca_compile.lowering.onnx.complex_pairs import without_complex
from moeca_compile.lowering.onnx.constants import bind_weights, drop_unread, fold_constants, transpose_linears
from moeca_compile.lowering.onnx.quantized.keep import keep_quantized
from moeca_compile.lowering.onnx.request import OnnxRequest
from moeca_compile.lowering.onnx.rotary.rewrite import write_rotary
from moeca_compile.lowering.onnx.small_forms import drop_squeezes, loosen_views, spread_masks, write_experts
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
from moeca_compile.passes.dump import Dump
from moeca_compile.passes.facts import Facts, RewriteRequest
from moeca_compile.passes.manager import Finder, Pass, PassManager, PassRecord
from moeca_compile.passes.partial.expand_slots import expand_slots
from moeca_compile.passes.partial.find_divisions import find_divisions
from moeca_compile.passes.partial.insert_partial import insert_partial
from moeca_compile.passes.registry import is_registered, with_registered
from moeca_compile.passes.transform.drop_dead import drop_dead
from moeca_compile.passes.transform.drop_noops import drop_noops
from moeca_compile.passes.transform.hoist import hand_out, hoist_invariant, hoist_step_only, name_of
from moeca_compile.passes.transform.insert_signal import insert_signal
from moeca_compile.passes.transform.insert_state import insert_state
from moeca_compile.passes.transform.keep_caches import keep_caches
from moeca_compile.passes.transform.layout import state_layout
from moeca_compile.passes.transform.materialize_casts import materialize_casts
from moeca_compile.passes.transform.plain_einsum import plain_einsum
from moeca_compile.passes.transform.ports import COEFFICIENTS, NOW
from moeca_compile.passes.transform.separate_rows import separate_rows
from moeca_compile.passes.transform.tag_row import tag_row
from moeca_compile.passes.transform.verify_variant import verify_variant
from moeca_compile.schedule import Row, Schedule
from moeca_compile.schedule.granularity import Granularity

C = TypeVar("C")

NORMALIZE: tuple[Pass[Facts], ...] = (
    materialize_casts,  # NOTE: first, registered passes come after it; what autocast converts in the dispatcher
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
    find_divisions,  # NOTE: after find_spans; which regions can be recomputed in part
    find_signal,  # NOTE: after find_divisions; what an adaptive schedule watches
    find_hoisted,  # what doesn't change with the latent
)

REWRITE: tuple[Pass[RewriteRequest], ...] = (
    tag_row,  # decide: one mark per region output
    insert_state,  # act: read, extrapolate, write the state of whole regions
    insert_partial,  # the same for regions whose tokens and branches age one by one
    expand_slots,  # NOTE: after insert_partial; in programs that other runtimes run
    keep_caches,  # NOTE: after insert_state and insert_partial; what a skipped region would write in place
    insert_signal,  # what an adaptive schedule decides by
    drop_dead,  # NOTE: after those that insert; only now are the skipped regions dead
    hoist_step_only,  # NOTE: after drop_dead; what depends on the timestep and not on the latent comes in from outside
    hoist_invariant,  # NOTE: after hoist_step_only; and what is left that stays the same in a trajectory
    verify_variant,  # NOTE: last; lowering must get what the row promises
)

PROLOGUE: tuple[Pass[RewriteRequest], ...] = (  # how hoisted values are computed
    hand_out,
    drop_dead,
    hoist_invariant,  # NOTE: last; what a timestep's values are made of may be shared too
)

LOWER_INDUCTOR: tuple[Pass[Variant], ...] = (
    split_table,  # an input for each region's coefficients
    weight_addresses,  # NOTE: after split_table; one input for the weights of a layer's kept branches
    fold_linear,  # a linear over a slice of the channels is one product
    straight_stream,  # NOTE: before repeat_blocks; what goes from body to body comes in order
    repeat_blocks,  # NOTE: last; equal blocks are compiled once
)

LOWER_NATIVE: tuple[Pass[Variant], ...] = (fold_linear,)  # AOTInductor has no shared bodies of equal blocks

LOWER_ONNX: tuple[Pass[OnnxRequest], ...] = (
    any_batch,  # NOTE: first; it compares the graph with the captures at other batches
    drop_squeezes,  # ONNX refuses to squeeze a dimension that isn't 1
    write_experts,  # the form that the targets run
    write_rotary,  # NOTE: after any_batch, before fold_constants; a folded table doesn't say how it was made
    bind_weights,  # NOTE: after any_batch; weights become constants
    keep_quantized,  # NOTE: after bind_weights
    fold_constants,  # NOTE: after keep_quantized, it would make floating-point numbers of quantized weights
    transpose_linears,  # NOTE: after fold_constants; a transposed weight is computed here, once
    drop_unread,  # what was folded
    spread_masks,  # NOTE: after fold_constants; a constant mask stays as small as it is
    without_complex,  # NOTE: after bind_weights; ONNX runtimes have no complex numbers
    loosen_views,  # NOTE: last; a rewrite may have changed strides
)

HOIST: tuple[Pass[RewriteRequest], ...] = (hoist_step_only, hoist_invariant)
# may be disabled: results stay right without them
OPTIONAL = frozenset(function.__name__ for function in (*NORMALIZE[1:], *HOIST, *LOWER_INDUCTOR[1:]))


@dataclass(frozen=True)
class Pipeline:
    """Which passes of the page make a program."""

    normalize: tuple[Pass[Facts], ...] = NORMALIZE
    rewrite: tuple[Pass[RewriteRequest], ...] = REWRITE
    in_place: bool = False  # Inductor's programs may change kept branches where they lie


# Programs for torch: operators of ours stay what they are.
WITH_PROLOGUES = Pipeline(rewrite=tuple(one for one in REWRITE if one is not expand_slots), in_place=True)
# Programs that stand by themselves: no prologue beside them, and no operator that looks at a call's indices.
STANDALONE = Pipeline(
    normalize=tuple(function for function in NORMALIZE if function is not separate_rows),
    rewrite=tuple(function for function in REWRITE if function not in HOIST),
)
# Programs for other runtimes and for native code, with prologues beside them.
PORTABLE = Pipeline(normalize=STANDALONE.normalize)


@dataclass(frozen=True)
class Analysis:
    """One captured graph, all facts about it, and the passes that its programs are made by."""

    gm: GraphModule
    facts: Facts
    records: tuple[PassRecord, ...]
    pipeline: Pipeline = WITH_PROLOGUES


def analyze(
    gm: GraphModule, args: Sequence[Any], inputs: Sequence[Input], options: Options, captured: Capture | None = None,
    pipeline: Pipeline = WITH_PROLOGUES,
) -> Analysis:  # fmt: skip
    """capture (unless `captured`) -> normalize -> find, for the shapes and dtypes of `args`.

    Raises:
        CaptureError: the graph can't be made functional.
        OptionError: `disable` names a pass that doesn't exist or can't be left out.
    """
    manager = manager_of(options)
    captured = captured or capture(gm, args, inputs)
    facts = Facts(captured.inputs, Granularity.parse(options.granularity), caches=captured.caches)
    before = replace(facts, indices=_indices(captured.inputs, inputs, args), autocast=captured.autocast)
    passes = _with_registered("normalize", NORMALIZE, pipeline.normalize, first=1)
    normal = manager.rewrite(passes, captured.gm, before)
    facts = manager.find(with_registered("find", FIND), normal, facts)
    return Analysis(normal, facts, tuple(manager.records), pipeline)


_INDICES = (torch.bool, torch.int32, torch.int64)


def _indices(captured: Sequence[Input], inputs: Sequence[Input], args: Sequence[Any]) -> dict[str, Tensor]:
    arguments = {entry.label: arg for entry, arg in zip(inputs, args, strict=True) if not entry.is_weight}
    by_name = {entry.name: arguments.get(entry.label) for entry in captured}
    return {
        name: arg
        for name, arg in by_name.items()
        if type(arg) is Tensor and arg.dim() == 1 and arg.dtype in _INDICES and not arg.is_meta
    }


def build_variant(
    analysis: Analysis, schedule: Schedule, row: Row, options: Options, name: str
) -> tuple[Variant, tuple[PassRecord, ...]]:
    """rewrite: the program of one row, among others that keep the state of `schedule`, fitted to these regions.

    A schedule that keeps nothing hoists nothing either: each call's results are those of its own inputs and weights,
    whatever was written to between calls, and nobody has to look. It does if `free_hoisted` asks for it.
    """
    layout = state_layout(analysis.facts.regions, schedule)
    in_place = analysis.pipeline.in_place and options.inner == "inductor"
    request = RewriteRequest(analysis.facts, row, layout, schedule.order, schedule.control, in_place=in_place)
    manager = manager_of(options)
    passes = _with_registered("rewrite", REWRITE, analysis.pipeline.rewrite)
    if not (layout or options.free_hoisted):
        passes = [function for function in passes if function not in HOIST]
    variant = _variant(name, manager.rewrite(passes, analysis.gm, request, label=f"{name} "), request)
    if manager.dump is not None:
        dump = Dump(manager.dump)
        dump.schedule(schedule)
        dump.variant(variant, layout, [entry.name for entry in analysis.facts.inputs])
    return variant, tuple(manager.records)


def build_prologue(
    analysis: Analysis, gives: tuple[int, ...], options: Options, name: str
) -> tuple[Variant, tuple[PassRecord, ...]]:
    """The program of these hoisted values (positions in the facts' list, all of one level)."""
    request = RewriteRequest(analysis.facts, gives=gives)
    manager = manager_of(options)
    variant = _variant(name, manager.rewrite(PROLOGUE, analysis.gm, request, label=f"{name} "), request)
    if manager.dump is not None:
        Dump(manager.dump).variant(variant, (), [entry.name for entry in analysis.facts.inputs])
    return variant, tuple(manager.records)


def lower(
    variant: Variant, args: Sequence[Any], options: Options, sizes: SharedSizes | None = None,
    other: AtOtherSize = lambda: None,
) -> tuple[Executable, tuple[PassRecord, ...]]:  # fmt: skip
    """lower: a variant or prologue, compiled by Inductor for tensors like `args`, or for `sizes` of many. `other`: the
    variant at another size.

    Raises:
        LoweringError: Inductor refused the graph, the mode, or an option.
    """
    manager = manager_of(options)
    run = lower_inductor(variant, args, options.mode, options.inner_options, LOWER_INDUCTOR, manager, sizes, other)
    return run, tuple(manager.records)


def lower_native(variant: Variant, args: Sequence[Any], options: Options, file: Path) -> None:
    """lower: a variant or prologue, written to `file` as native code for tensors like `args`.

    Raises:
        LoweringError: AOTInductor refused the graph, the mode, or an option.
    """
    write_native(variant, args, file, options.mode, options.inner_options, LOWER_NATIVE, manager_of(options))


def _with_registered(
    stage: str, page: tuple[Pass[C], ...], passes: tuple[Pass[C], ...], first: int = 0
) -> list[Pass[C]]:
    """The passes of a stage that make a program, and registered ones: those have their place by the whole page."""
    return [function for function in with_registered(stage, page, first) if function in passes or function not in page]


def _variant(name: str, gm: GraphModule, request: RewriteRequest) -> Variant:
    layout = request.layout
    positions = {entry.name: i for i, entry in enumerate(request.facts.inputs)}
    hoisted = {name_of(i): i for i in range(len(request.facts.hoisted))}
    slots = {slot.name: i for i, slot in enumerate(layout)}
    names = [node.name for node in fx.placeholders(gm)]
    writes = tuple(slots[name] for name in gm.meta.get("moeca_writes", ()))
    changes = tuple(sorted(slots[name] for name in gm.meta.get("moeca_changes", ())))
    return Variant(
        name=name,
        row=request.row,
        gm=_in_order(gm, [*positions, *hoisted, *slots, NOW, COEFFICIENTS]),
        takes=tuple(sorted(positions[name] for name in names if name in positions)),
        hoists=tuple(sorted(hoisted[name] for name in names if name in hoisted)),
        reads=tuple(sorted(slots[name] for name in names if name in slots)),
        writes=writes,
        changes=changes,
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


def manager_of(options: Options) -> PassManager:
    """The pass manager that these options and the environment ask for.

    Raises:
        OptionError: `disable` names a pass that doesn't exist or can't be left out.
    """
    fixed = [name for name in options.disable if name not in OPTIONAL and not is_registered(name)]
    if fixed:
        raise OptionError(f"disable={fixed}: only {sorted(OPTIONAL)} can be left out")
    return PassManager(dump_folder(options), options.disable)


def dump_folder(options: Options) -> Path | None:
    folder = options.dump or os.environ.get("MOECA_DUMP")
    return Path(folder) if folder else None
