"""`moeca_compile.export`: the steps of an export, in order.

    refuse -> capture -> lower -> write -> golden steps -> check -> engines

Each step is one function that says what it takes and gives; what they give together becomes the manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moeca_compile.exporting import request
from moeca_compile.exporting.capture import batch_range, capture_sizes
from moeca_compile.exporting.check import check_export
from moeca_compile.exporting.engines import add_engines
from moeca_compile.exporting.golden import TOLERANCE
from moeca_compile.exporting.lower import expert_lowering, lower_sizes
from moeca_compile.exporting.packages.entry import write_package
from moeca_compile.exporting.parameters import warn_of_widened
from moeca_compile.exporting.refuse import (
    AOTI,
    has_prologues,
    refuse_beside_native,
    refuse_request,
    refuse_schedule,
    refuse_sizes,
)
from moeca_compile.exporting.write import write_fused, write_golden_steps, write_graphs
from moeca_compile.frontend.arguments import Arguments
from moeca_compile.frontend.model_arguments import plain_module, single_model
from moeca_compile.graph.capture import no_collector
from moeca_compile.inspect.progress import bar
from moeca_compile.lowering.experts.choose import choose
from moeca_compile.lowering.tensorrt.build import EngineRequest
from moeca_compile.options import Options
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.packages.package import Package
from moeca_compile.runtime.writing import building, write_manifest
from moeca_compile.schedule import Schedule


def export(
    model: torch.nn.Module,
    example_inputs: Arguments,
    schedule: Schedule | str | Path,
    path: str | Path,
    *,
    targets: str | Sequence[str] = ("onnx",),
    opset: int = 20,
    experts: str = "auto",
    dynamic_batch: bool | tuple[int, int] = True,
    other_sizes: Sequence[Arguments] = (),
    fused: bool = False,
    order: int | None = None,
    granularity: str = "region",
    prologues: bool | None = None,
    engines: EngineRequest | None = None,
    progress: bool = False,
) -> Bundle | Package:
    """Write a bundle: one ONNX graph for each distinct row of the schedule, over one file of weights.

    The model is prepared in place, as for compiling. What was written is opened and run before this returns: the golden
    steps against torch, and with `dynamic_batch` more batches against the model as it is.

    Args:
        model: on the CPU, in eval mode.
        example_inputs: what one call gets, positional arguments or a mapping of keywords. Sizes but the batch's are
            fixed by it and by `other_sizes`, and numbers among them become constants.
        schedule: a `Schedule`, the path of one, or a short form such as "uniform:3".
        path: the directory to make; it must not exist.
        targets: what is to run the graphs: "onnx" (onnxruntime on CPUs), "openvino", "cuda" (onnxruntime on CUDA),
            "tensorrt"; one, or several. They decide the form of the experts. "aoti", by itself: a package as
            `moeca_compile.save` writes it, with dynamic_batch=False.
        opset: of the graphs, 18 to 24; for "tensorrt" to 20. From 23 on, attention, RMS norms and rotary
            embeddings are one operator each.
        experts: how the routed experts are written: "segments", "dense", "moe", "capacity" or "capacity:1.25" (times
            the rows of an even routing); "auto": the best exact one that all targets run.
        dynamic_batch: for any batch. (1, 8): for batches from 1 to 8; the export tries both, engines are built for
            them, and sessions refuse others. False: for the example's batch only.
        other_sizes: more example inputs, one for each further resolution (or length of the prompt; or batch, without
            `dynamic_batch`). Each gets graphs of its own over the same weights; a call finds its own by its shapes.
        fused: also write `fused.onnx`, all variants in one graph that counts its steps.
        order: of the forecast, for short forms (None: 1). A `Schedule` and a file have their own.
        granularity: as in `Options`.
        prologues: whether values that don't depend on the latent become graphs of their own, which a session runs once
            a trajectory or once a timestep, so that no variant has the weights that only they read. None: yes, unless
            `fused`, the target "tensorrt" or granularity "output" needs whole graphs.
        engines: which to build for the target "tensorrt". By default those that can be built here: without TensorRT, or
            without the GPU that it needs, there are none, with a warning.
        progress: show a bar.

    Returns:
        The bundle, opened; for the target "aoti" the package.

    Raises:
        CaptureError: the model isn't one graph, or has nothing to cache.
        LoweringError: no ONNX form, sizes that aren't linear in the batch, or a result that isn't the model's.
            An expert lowering that a target or the model doesn't take, or a capacity that drops golden branches.
        BundleError: the path is taken, or what was written can't be run.
        ScheduleError, OptionError: as for `compile`.
    """
    model = plain_module(single_model(model, "export"))
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    if AOTI in targets:
        for_bundles = {
            "opset": opset != 20,
            "experts": experts != "auto",
            "fused": fused,
            "engines": engines is not None,
            "prologues": prologues is not None,
        }
        refuse_beside_native(targets, bool(dynamic_batch), for_bundles)
        native = Options(schedule=schedule, order=order, granularity=granularity)
        return write_package(
            model, (example_inputs, *other_sizes), (native, native.resolved_schedule()), path, progress
        )
    refuse_request(model, targets, opset)
    choose(experts, targets)  # raises; what the model's own experts need comes when it is captured
    batches = batch_range(dynamic_batch)
    refuse_sizes(example_inputs, other_sizes, targets, batches is not None, fused)
    options = Options(schedule=schedule, order=order, granularity=granularity, inner="eager")
    refuse_schedule(options.resolved_schedule(), granularity, fused)
    hoist = has_prologues(prologues, targets, granularity, fused)
    examples = (example_inputs, *other_sizes)
    with building(Path(path)) as folder, bar(progress) as tick, torch.no_grad():
        tick("capturing", 0.0)
        with no_collector():
            sizes = capture_sizes(model, examples, options, batches, hoist)
            mains = [size[0] for size in sizes]
            lowering = expert_lowering(mains[0], experts, targets)
            lowered = lower_sizes(sizes, batches.captured if batches else (), opset, lowering, tick)
        tick("writing", 0.7)
        data = lowered.entries | {"targets": list(targets)}
        warn_of_widened(model, mains, [graph for _, graph in lowered.models.values()], data["dtype"])
        if batches and batches.largest:
            data["batch"] = [batches.least, batches.largest]
        data["id"] = write_graphs(folder, lowered.models, mains, model, targets)
        data["fused"] = write_fused(folder, mains[0], lowered, data["id"]) if fused else None
        tick("golden steps in torch", 0.75)
        counts = write_golden_steps(folder, mains, model)
        baked, *others = [request.numbers(model, example) for example in examples]
        data["model"] |= {"name": type(model).__name__, "baked": baked}
        data["golden"] = {"steps": counts[0], "tolerance": TOLERANCE[data["dtype"]], "measured": []}
        for size, numbers, steps in zip(data["sizes"], others, counts[1:], strict=True):
            size |= {"baked": numbers, "golden_steps": steps}
        write_manifest(folder, data)
        tick("checking", 0.85)
        tried = batches.tried if batches else ()
        data["golden"]["measured"] = check_export(folder, model, examples, mains, targets, tried, data["dtype"])
        write_manifest(folder, data)
        if "tensorrt" in targets:
            add_engines(folder, Path(path), engines, tick)
    return Bundle.open(path)
