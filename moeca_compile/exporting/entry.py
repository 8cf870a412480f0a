"""`moeca_compile.export`, in order: capture, rewrite, lower, write, check what was written."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moeca_compile.errors import BundleError, CaptureError, LoweringError, MoecaWarning, OptionError
from moeca_compile.exporting import request
from moeca_compile.exporting.check import TOLERANCE, check_export
from moeca_compile.exporting.describe import describe, file_of
from moeca_compile.exporting.golden import golden_steps
from moeca_compile.exporting.request import Arguments, Captured
from moeca_compile.exporting.steps import step_table
from moeca_compile.exporting.write import write_fused, write_golden, write_graphs
from moeca_compile.face import inner_module, prepare
from moeca_compile.inspect.progress import Tick, bar
from moeca_compile.lower import tensorrt
from moeca_compile.lower.experts.choose import FORMS, Lowering, choose
from moeca_compile.lower.experts.rewrite import calls, why_no_moe
from moeca_compile.lower.onnx import OPSETS, lower_onnx
from moeca_compile.lower.onnx_fused import fuse
from moeca_compile.lower.tensorrt import EngineRequest
from moeca_compile.lower.tensorrt_operators import refuse_unsupported
from moeca_compile.options import Options
from moeca_compile.runtime.bundle import Bundle
from moeca_compile.runtime.manifest import COEFFICIENTS, FUSED, Dim, letters_of
from moeca_compile.runtime.trt.library import find
from moeca_compile.runtime.writing import building, write_manifest
from moeca_compile.schedule import Schedule

TARGETS = tuple(FORMS)
BATCHES = (2, 3)  # what a graph for any batch is captured at


def export(
    model: torch.nn.Module,
    example_inputs: Arguments,
    schedule: Schedule | str | Path,
    path: str | Path,
    *,
    targets: Sequence[str] = ("onnx",),
    opset: int = 20,
    experts: str = "auto",
    dynamic_batch: bool = True,
    fused: bool = False,
    order: int = 1,
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
            fixed by it, and numbers among them become constants.
        schedule: a `Schedule`, the path of one, or a short form such as "uniform:3".
        path: the directory to make; it must not exist.
        targets: what is to run the graphs: "onnx" (onnxruntime on CPUs), "openvino", "cuda" (onnxruntime on CUDA),
            "tensorrt". They decide the form of the experts.
        opset: of the graphs, 18 to 22; for "tensorrt" to 20.
        experts: how the routed experts are written: "segments", "dense", "moe", "capacity" or "capacity:1.25" (times
            the rows of an even routing); "auto": the best exact one that all targets run.
        dynamic_batch: for any batch. False: for the example's batch only.
        fused: also write `fused.onnx`, all variants in one graph that counts its steps.
        order: of the forecast, for short forms.
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
        BundleError: the path is taken, what was written can't be run, or the schedule has PARTIAL rows.
        ScheduleError, OptionError: as for `compile`.
    """
    _refuse(model, targets, opset)
    options = Options(schedule=schedule, order=order, granularity=granularity, inner="eager")
    options.resolved_schedule()
    model = inner_module(model)
    with building(Path(path)) as folder, bar(progress) as tick, torch.no_grad():
        tick("capturing", 0.0)
        prepare(model)
        captured = _capture(model, example_inputs, options, dynamic_batch)
        for row in captured[0].program.schedule.distinct_rows():
            letters_of(row)  # or it can't be written down
        lowering = _expert_lowering(captured[0], experts, targets)
        data, models = _lower(captured, opset, lowering, tick)
        data["targets"] = list(targets)
        tick("writing", 0.7)
        data["id"] = write_graphs(folder, models, captured[0].program.schedule)
        for name in models if "tensorrt" in targets else ():
            refuse_unsupported((folder / name).read_bytes(), name)
        data["fused"] = _fuse(folder, captured[0], data, models) if fused else None
        data["model"] |= {"name": type(model).__name__, "baked": request.numbers(model, example_inputs)}
        tick("golden steps in torch", 0.75)
        steps = golden_steps(captured[0])
        write_golden(folder, steps)
        dtype = data["dtype"]
        data["golden"] = {"steps": len(steps), "tolerance": TOLERANCE[dtype], "measured": []}
        write_manifest(folder, data)
        tick("checking", 0.85)
        data["golden"]["measured"] = check_export(
            folder, model, example_inputs, captured[0], targets, dynamic_batch, dtype
        )
        write_manifest(folder, data)
        if "tensorrt" in targets:
            _build_engines(folder, Path(path), engines, tick)
    return Bundle.open(path)


def _refuse(model: torch.nn.Module, targets: Sequence[str], opset: int) -> None:
    if unknown := [name for name in targets if name not in TARGETS] or (["nothing"] if not targets else []):
        raise OptionError(f"targets={list(targets)}: {', '.join(unknown)} can't be exported to; there are {TARGETS}")
    opsets = tensorrt.OPSETS if "tensorrt" in targets else OPSETS
    if opset not in opsets:
        raise OptionError(f"opset={opset}: expected {opsets.start} to {opsets.stop - 1} for targets={list(targets)}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(f"export needs {', '.join(missing)}: pip install 'moeca-compile[onnx]'")
    if not isinstance(model, torch.nn.Module):
        raise OptionError(f"export takes a torch.nn.Module, not {type(model).__name__}")
    if model.training:
        raise LoweringError("the model is in training mode: call model.eval() first")


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


def _lower(
    captured: Sequence[Captured], opset: int, experts: Lowering, tick: Tick
) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """Every distinct row's graph, and the part of the manifest that describes them."""
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
        twin = twins[0].program.variant(row) if twins else None
        model, signature = lower_onnx(variant, main.weights, names, outputs, opset, twin, BATCHES, experts)
        models[file_of(variant)] = letters_of(row), model
        shapes |= dict(signature.inputs) | dict(signature.outputs)
    return {"opset": opset, **describe(captured, shapes, BATCHES, experts)}, models


def _fuse(folder: Path, main: Captured, data: dict[str, Any], models: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """Write `fused.onnx` out of the variants' models, which are used up."""
    program = main.program
    table = step_table(program.schedule, program.layout, len(program.regions))
    entries = list(zip(table.variants, table.coefficients, strict=True))
    write_fused(folder, fuse([model for _, model in models.values()], data, entries, table.period), data["id"])
    return {"file": FUSED, "steps": table.steps}


def _build_engines(folder: Path, path: Path, wanted: EngineRequest | None, tick: Tick) -> None:
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
