"""`moeca_compile.export`, in order: capture, rewrite, lower, write, check what was written."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moeca_compile.api import prepare
from moeca_compile.errors import BundleError, CaptureError, LoweringError, MoecaWarning
from moeca_compile.exporting import request
from moeca_compile.exporting.check import check_export
from moeca_compile.exporting.describe import describe, file_of
from moeca_compile.exporting.golden import TOLERANCE, golden_steps
from moeca_compile.exporting.refuse import refuse_request, refuse_schedule, refuse_sizes
from moeca_compile.exporting.request import Arguments, Captured
from moeca_compile.exporting.steps import step_table
from moeca_compile.exporting.write import write_fused, write_golden, write_graphs
from moeca_compile.frontend.model_arguments import plain_module, single_model
from moeca_compile.inspect.progress import StepPlacement, bar
from moeca_compile.lowering.experts.choose import Lowering, choose
from moeca_compile.lowering.experts.rewrite import calls, why_no_moe
from moeca_compile.lowering.onnx.fused import fuse
from moeca_compile.lowering.onnx.lower import lower_onnx
from moeca_compile.lowering.tensorrt import build as tensorrt
from moeca_compile.lowering.tensorrt.build import EngineRequest
from moeca_compile.lowering.tensorrt.operators import refuse_unsupported
from moeca_compile.options import Options
from moeca_compile.pipeline import LOWER_ONNX, manager_of
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.dims import Dim
from moeca_compile.runtime.bundle.manifest import COEFFICIENTS, FUSED, GOLDEN, golden_file, letters_of
from moeca_compile.runtime.tensorrt.library import find
from moeca_compile.runtime.writing import building, write_manifest
from moeca_compile.schedule import Schedule

BATCHES = (2, 3, 7)  # what a graph for any batch is captured at: not 1, which torch takes for a size of its own


def export(
    model: torch.nn.Module,
    example_inputs: Arguments,
    schedule: Schedule | str | Path,
    path: str | Path,
    *,
    targets: str | Sequence[str] = ("onnx",),
    opset: int = 20,
    experts: str = "auto",
    dynamic_batch: bool = True,
    other_sizes: Sequence[Arguments] = (),
    fused: bool = False,
    order: int | None = None,
    granularity: str = "region",
    engines: EngineRequest | None = None,
    progress: bool = False,
) -> Bundle:
    """Write a bundle: one ONNX graph for each distinct row of the schedule, over one file of weights.

    The model is prepared in place, as for compiling. What was written is opened and run before this returns: the golden
    steps against torch, and with `dynamic_batch` two more batches against the model as it is.

    Args:
        model: on the CPU, in eval mode.
        example_inputs: what one call gets, positional arguments or a mapping of keywords. Sizes but the batch's are
            fixed by it and by `other_sizes`, and numbers among them become constants.
        schedule: a `Schedule`, the path of one, or a short form such as "uniform:3".
        path: the directory to make; it must not exist.
        targets: what is to run the graphs: "onnx" (onnxruntime on CPUs), "openvino", "cuda" (onnxruntime on CUDA),
            "tensorrt"; one, or several. They decide the form of the experts.
        opset: of the graphs, 18 to 22; for "tensorrt" to 20.
        experts: how the routed experts are written: "segments", "dense", "moe", "capacity" or "capacity:1.25" (times
            the rows of an even routing); "auto": the best exact one that all targets run.
        dynamic_batch: for any batch. False: for the example's batch only.
        other_sizes: more example inputs, one for each further resolution (or length of the prompt; or batch, without
            `dynamic_batch`). Each gets graphs of its own over the same weights; a call finds its own by its shapes.
        fused: also write `fused.onnx`, all variants in one graph that counts its steps.
        order: of the forecast, for short forms (None: 1). A `Schedule` and a file have their own.
        granularity: as in `Options`.
        engines: which to build for the target "tensorrt". By default those that can be built here: without TensorRT, or
            without the GPU that it needs, there are none, with a warning.
        progress: show a bar.

    Returns:
        The bundle, opened.

    Raises:
        CaptureError: the model isn't one graph, or has nothing to cache.
        LoweringError: no ONNX form, sizes that aren't linear in the batch, or a result that isn't the model's.
            An expert lowering that a target or the model doesn't take, or a capacity that drops golden branches.
        BundleError: the path is taken, what was written can't be run, or the schedule is adaptive or has PARTIAL rows.
        ScheduleError, OptionError: as for `compile`.
    """
    model = plain_module(single_model(model, "export"))
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    refuse_request(model, targets, opset)
    choose(experts, targets)  # raises; what the model's own experts need comes when it is captured
    refuse_sizes(example_inputs, other_sizes, targets, dynamic_batch, fused)
    options = Options(schedule=schedule, order=order, granularity=granularity, inner="eager")
    refuse_schedule(options.resolved_schedule())
    examples = (example_inputs, *other_sizes)
    with building(Path(path)) as folder, bar(progress) as tick, torch.no_grad():
        tick("capturing", 0.0)
        report = prepare(model)
        for example in examples:
            request.try_call(model, example)
        try:
            captured = _capture_all(model, examples, options, dynamic_batch)
        except CaptureError as error:
            if not report.rejected:
                raise
            left = "; ".join(str(miss) for miss in report.rejected[:3])
            raise CaptureError(
                f"{error}. {len(report.rejected)} expert dispatches are left as they are: {left}"
            ) from error
        main = captured[0][0]
        lowering = _expert_lowering(main, experts, targets)
        data, models = _lower_all(captured, opset, lowering, tick)
        data["targets"] = list(targets)
        tick("writing", 0.7)
        data["id"] = write_graphs(folder, models, main.program.schedule)
        for name in models if "tensorrt" in targets else ():
            refuse_unsupported((folder / name).read_bytes(), name)
        data["fused"] = _fuse(folder, main, data, models) if fused else None
        baked, *others = [request.numbers(model, one) for one in examples]
        data["model"] |= {"name": type(model).__name__, "baked": baked}
        tick("golden steps in torch", 0.75)
        steps = golden_steps(main, model)
        write_golden(folder / GOLDEN, steps)
        for i, (size, (twin, *_), numbers) in enumerate(zip(data["sizes"], captured[1:], others, strict=True), 1):
            further = golden_steps(twin, model)
            write_golden(folder / golden_file(i), further)
            size |= {"baked": numbers, "golden_steps": len(further)}
        dtype = data["dtype"]
        data["golden"] = {"steps": len(steps), "tolerance": TOLERANCE[dtype], "measured": []}
        write_manifest(folder, data)
        tick("checking", 0.85)
        data["golden"]["measured"] = check_export(
            folder, model, examples, [one for one, *_ in captured], targets, dynamic_batch, dtype
        )
        write_manifest(folder, data)
        if "tensorrt" in targets:
            _build_engines(folder, Path(path), engines, tick)
    return Bundle.open(path)


def _capture_all(
    model: torch.nn.Module, examples: Sequence[Arguments], options: Options, dynamic_batch: bool
) -> list[list[Captured]]:
    """Each size at its batches."""
    captured = [_capture(model, one, options, dynamic_batch) for one in examples]
    main = captured[0][0]
    for i, (other, *_) in enumerate(captured[1:]):
        said = [(one.program.regions.fingerprint, one.called, one.results) for one in (main, other)]
        if said[0] != said[1]:
            raise LoweringError(
                f"other_sizes[{i}]: the model has other regions, inputs or outputs at this size. Export a bundle for it"
            )
    return captured


def _capture(model: torch.nn.Module, example: Arguments, options: Options, dynamic_batch: bool) -> list[Captured]:
    """At the batches that it takes; the fixed one is the example's."""
    if not dynamic_batch:
        return [request.capture(model, example, options)]
    try:
        found = [request.capture(model, request.rebatched(example, batch), options) for batch in BATCHES]
    except CaptureError as error:
        raise CaptureError(f"{error} (at another batch; dynamic_batch=False takes the example as it is)") from error
    if len({one.program.regions.fingerprint for one in found}) > 1:
        raise LoweringError("the model's regions depend on its batch: export it with dynamic_batch=False")
    return found


def _expert_lowering(main: Captured, experts: str, targets: Sequence[str]) -> Lowering:
    gm = main.program.variant(main.program.schedule.rows[0]).gm
    chosen, slower = choose(experts, targets, why_no_moe(gm))
    if slower and calls(gm):
        warnings.warn(
            f"a bundle has one form of the experts, here {str(chosen)!r}: {slower}. A bundle a target is fastest",
            MoecaWarning,
            stacklevel=3,
        )
    return chosen


def _lower_all(
    captured: Sequence[Sequence[Captured]], opset: int, experts: Lowering, tick: StepPlacement
) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """All graphs of all sizes, and the part of the manifest that describes them."""
    (data, models), *others = [_lower(one, i, opset, experts, tick) for i, one in enumerate(captured)]
    data["sizes"] = [{name: other[name] for name in ("inputs", "outputs", "state", "variants")} for other, _ in others]
    return data, models | {name: model for _, own in others for name, model in own.items()}


def _lower(
    captured: Sequence[Captured], size: int, opset: int, experts: Lowering, tick: StepPlacement
) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """Every distinct row's graph at one size, and the part of the manifest that describes them."""
    main, *twins = captured
    rows = main.program.schedule.distinct_rows()
    names = main.names | {slot.name: f"{slot.name}_in" for slot in main.program.layout} | {COEFFICIENTS: COEFFICIENTS}
    models: dict[str, tuple[str, Any]] = {}
    shapes: dict[str, tuple[Dim, ...]] = {}
    for i, row in enumerate(rows):
        tick(f"variant {i + 1} of {len(rows)} to ONNX", 0.1 + 0.6 * i / len(rows))
        variant = main.program.variant(row)
        outputs = [
            *(name for name, _ in main.results),
            *(f"{main.program.layout[slot].name}_out" for slot in variant.writes),
        ]
        alike = [variant, *(one.program.variant(row) for one in twins)]
        model, signature = lower_onnx(
            alike, BATCHES, main.weights, names, outputs, opset, experts, LOWER_ONNX, manager_of(main.program.options)
        )
        models[file_of(variant, size)] = letters_of(row), model
        shapes |= dict(signature.inputs) | dict(signature.outputs)
    return {"opset": opset, **describe(captured, size, shapes, BATCHES, experts)}, models


def _fuse(folder: Path, main: Captured, data: dict[str, Any], models: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """Write `fused.onnx` out of the variants' models, which are used up."""
    program = main.program
    table = step_table(program.schedule, program.layout, len(program.regions))
    entries = list(zip(table.variants, table.coefficients, strict=True))
    write_fused(folder, fuse([model for _, model in models.values()], data, entries, table.period), data["id"])
    return {"file": FUSED, "steps": table.steps}


def _build_engines(folder: Path, path: Path, wanted: EngineRequest | None, tick: StepPlacement) -> None:
    if wanted is None:
        try:
            tensorrt.targets(find(), ())
        except BundleError as error:
            warnings.warn(
                f"no engines were built: {error}. On the machine that is to run them: moeca engines {path}",
                MoecaWarning,
                stacklevel=3,
            )
            return
    tensorrt.build_engines(Bundle.open(folder), wanted, lambda text, done: tick(text, 0.9 + 0.1 * done))
