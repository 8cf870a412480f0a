"""Captures -> ONNX models, one for each distinct row at each size, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeca_compile.errors import warn
from moeca_compile.exporting.describe import describe, file_of
from moeca_compile.exporting.request import Captured
from moeca_compile.graph import fx
from moeca_compile.inspect.progress import ProgressCallback
from moeca_compile.lowering.experts.choose import Lowering, choose
from moeca_compile.lowering.experts.rewrite import calls, why_no_moe
from moeca_compile.lowering.onnx.batch import Batches
from moeca_compile.lowering.onnx.lower import lower_onnx
from moeca_compile.passes.transform import ports
from moeca_compile.passes.transform.hoist import name_of
from moeca_compile.pipeline import LOWER_ONNX, manager_of
from moeca_compile.runtime.bundle.dims import Dim
from moeca_compile.runtime.bundle.manifest import COEFFICIENTS, NOW, OF_SIZE
from moeca_compile.schedule.action import format_row, legend_of


@dataclass(frozen=True)
class Lowered:
    """Attributes:
    models: by file name, the letters of the row and the onnx_ir.Model.
    entries: the manifest's, as far as they follow from the graphs.
    """

    models: dict[str, tuple[str, Any]]
    entries: dict[str, Any]


def expert_lowering(main: Captured, experts: str, targets: Sequence[str]) -> Lowering:
    """The form of the routed experts; warns where some target would be faster with another.

    Raises:
        LoweringError: a target, or the model, doesn't take the form that `experts` names.
    """
    gm = main.variants[0][1].gm
    chosen, slower = choose(experts, targets, why_no_moe(gm))
    if slower and calls(gm):
        warn(f"a bundle has one form of the experts, here {str(chosen)!r}: {slower}. A bundle a target is fastest")
    return chosen


def lower_sizes(
    sizes: Sequence[Sequence[Captured]], batches: Batches, opset: int, experts: Lowering, tick: ProgressCallback
) -> Lowered:
    """All graphs of all sizes.

    Args:
        sizes: for each size its captures, as `capture_sizes` gives them.
        batches: what these are captured at, where there are several.

    Raises:
        LoweringError: an operator has no ONNX form, or a size isn't linear in the batch.
    """
    main, *others = [_lower(captures, i, batches, opset, experts, tick) for i, captures in enumerate(sizes)]
    models, entries = main.models, main.entries | {"sizes": []}
    for other in others:
        models |= other.models
        entries["sizes"].append({name: other.entries[name] for name in OF_SIZE if name in other.entries})
    return Lowered(models, entries)


def _lower(
    captures: Sequence[Captured], size: int, batches: Batches, opset: int, experts: Lowering, tick: ProgressCallback
) -> Lowered:
    """Every distinct row's graph at one size."""
    main = captures[0]
    layout = main.network.layout
    names = (
        main.names
        | {value: f"{value}_in" for value in map(name_of, range(len(main.network.prologues.hoisted)))}
        | {slot.name: f"{slot.name}_in" for slot in layout}
        | {ports.COEFFICIENTS: COEFFICIENTS, ports.NOW: NOW}
    )
    models: dict[str, tuple[str, Any]] = {}
    shapes: dict[str, tuple[Dim, ...]] = {}
    hoisted = {
        name_of(position): node
        for prologue in main.prologues
        for position, node in zip(prologue.gives, fx.nodes_of(fx.output_node(prologue.variant.gm).args[0]), strict=True)
    }
    legend = legend_of(main.program.schedule.rows)
    count = len(main.variants)
    for i, ((row, variant), *others) in enumerate(zip(*(capture.variants for capture in captures), strict=True)):
        tick(f"variant {i + 1} of {count} to ONNX", 0.1 + 0.6 * i / count)
        outputs = [*(name for name, _ in main.results), *(f"{layout[slot].name}_out" for slot in variant.writes)]
        alike = [variant, *(twin for _, twin in others)]
        model, signature = lower_onnx(
            alike, batches, main.weights, names, outputs, opset, experts, LOWER_ONNX, manager_of(main.network.options),
            main.parameters, hoisted,
        )  # fmt: skip
        models[file_of(variant, size)] = format_row(row, legend), model
        shapes |= dict(signature.inputs) | dict(signature.outputs)
    for prologue, *twins in zip(*(capture.prologues for capture in captures), strict=True):
        alike = [prologue.variant, *(twin.variant for twin in twins)]
        outputs = [f"{name_of(position)}_out" for position in prologue.gives]
        model, signature = lower_onnx(
            alike, batches, main.weights, names, outputs, opset, experts, LOWER_ONNX, manager_of(main.network.options),
            main.parameters, hoisted,
        )  # fmt: skip
        models[file_of(prologue.variant, size)] = prologue.variant.name, model
        shapes |= dict(signature.inputs) | dict(signature.outputs)
    return Lowered(models, {"opset": opset, **describe(captures, size, shapes, batches, experts)})
