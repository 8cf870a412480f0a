"""`moeca_compile.save`: the steps of saving a package, in order.

refuse -> capture -> golden steps -> compile -> write -> load and compare
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from moeca_compile.api import prepare
from moeca_compile.errors import LoweringError, OptionError, StateError
from moeca_compile.exporting import request
from moeca_compile.exporting.describe import versions
from moeca_compile.exporting.golden import golden_steps
from moeca_compile.exporting.packages.call import ModelCall
from moeca_compile.exporting.packages.check import error_of
from moeca_compile.exporting.packages.describe import describe_model, describe_size
from moeca_compile.exporting.packages.programs import write_programs
from moeca_compile.frontend.arguments import Arguments
from moeca_compile.frontend.backend import read_options
from moeca_compile.frontend.handles import Read, state_of
from moeca_compile.frontend.model_arguments import compiled_parts, plain_module, single_model
from moeca_compile.frontend.owner import handle_of
from moeca_compile.inspect.progress import ProgressCallback, bar
from moeca_compile.options import Options
from moeca_compile.pipeline import PORTABLE
from moeca_compile.runtime.bundle.manifest import PACKAGE_FORMAT, SCHEDULE
from moeca_compile.runtime.packages.machine import this_machine
from moeca_compile.runtime.packages.manifest import VERSION, WEIGHTS
from moeca_compile.runtime.packages.package import Package
from moeca_compile.runtime.writing import building, write_manifest
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.granularity import OUTPUT


def save(
    model: Any, folder: str | Path, *inputs: Any, other_sizes: Sequence[Arguments] = (), progress: bool = False,
    **keywords: Any,
) -> Package:  # fmt: skip
    """Save a compiled model as a package: native code of every variant and prologue over one file of weights.

    `load` opens it, in a process that needs neither Dynamo nor a C++ compiler. The code runs with the same version of
    torch, on processors that have the instructions of this one. What was written is loaded and run before this
    returns, and compared with the model in eager torch.

    Args:
        model: what `compile` or `torch.compile(model, backend="moeca")` gave for a module on the CPU, or a pipeline
            with one such transformer. Its options and its schedule are saved.
        folder: the directory to make; it must not exist.
        *inputs: inputs of one call, as the model takes them. All shapes and dtypes are fixed by them, the batch too;
            what is no tensor among them becomes a constant.
        other_sizes: more example inputs, each a tuple of positional inputs or a mapping of keywords, for further
            batches, resolutions or constants. Each gets native code of its own over the same weights.
        progress: show a bar.
        **keywords: inputs that the model takes by name.

    Returns:
        The package, opened.

    Raises:
        StateError: the model isn't compiled with moeca.
        OptionError: no inputs, inputs that the model's signature doesn't take, or one size twice.
        CaptureError: the model isn't one graph, or has nothing to cache.
        LoweringError: a model on another device, a result or an argument of a type that can't be written down, a
            granularity without a graph, a graph that AOTInductor refuses, or native code that gives another result.
        BundleError: the folder is taken, or can't be written.
    """
    (handle,) = compiled_parts(single_model(model, "save"), "save")
    context = handle_of(handle)
    if context is None or not isinstance(handle, torch.nn.Module):
        raise StateError(f"save: expected a compiled module, and got {type(handle).__name__}: pass what compile gave")
    if not inputs and not keywords:
        raise OptionError("save: inputs of one call are missing: moeca_compile.save(model, folder, *inputs)")
    module = plain_module(handle)
    first = _arguments(module, inputs, keywords)
    state = state_of(context, partial(read_options, Options()))
    return write_package(module, (first, *other_sizes), (state.options, state.schedule), folder, progress)


def write_package(
    module: torch.nn.Module, examples: Sequence[Arguments], read: Read, folder: str | Path, progress: bool = False
) -> Package:
    """Write a package of a plain module. `examples`: what one call gets, one for each size; `read`: options, and the
    schedule as it was read. Errors are those of `save`."""
    options, schedule = read
    _refuse(module, options)
    path = Path(folder)
    with building(path) as unfinished, bar(progress) as tick, torch.no_grad():
        tick("capturing", 0.0)
        error = _write(unfinished, module, examples, options, schedule, tick)
        tick(f"largest error {error:.1e}", 1.0)
    return Package.open(path)


def _write(
    folder: Path, module: torch.nn.Module, examples: Sequence[Arguments], options: Options, schedule: Schedule,
    tick: ProgressCallback,
) -> float:  # fmt: skip
    prepare(module)
    calls = [ModelCall(module, example) for example in examples]
    if len({call.kind for call in calls}) < len(calls):
        raise OptionError("other_sizes: the same shapes, dtypes and constants twice")
    plain = replace(options, inner="eager", inner_options={}, mode=None)
    weights: dict[str, torch.Tensor] = {}
    captures = [request.capture(module, call.arguments, plain, PORTABLE, schedule) for call in calls]
    golden = [golden_steps(captured, module) for captured in captures]
    sizes = []
    for number, (call, captured) in enumerate(zip(calls, captures, strict=True)):
        programs = write_programs(folder, captured, options, number, tick)
        sizes.append(describe_size(call, captured, programs, weights))
    torch.save(weights, folder / WEIGHTS)
    captures[0].program.schedule.save(folder / SCHEDULE)
    entries = {
        "format": PACKAGE_FORMAT,
        "version": VERSION,
        "made_with": versions(),
        "made_for": this_machine(torch.__version__),
        "model": describe_model(module, weights, calls),
        "latent_jump": options.latent_jump,
        "pack_experts": any(captured.program.packs_experts for captured in captures),
        "relative_error": 0.0,
        "sizes": sizes,
    }
    data: dict[str, Any] = msgspec.to_builtins(entries)
    write_manifest(folder, data)
    tick("comparing with eager torch", 0.95)
    data["relative_error"] = error = error_of(folder, golden, captures)
    write_manifest(folder, data)
    return error


def _refuse(module: torch.nn.Module, options: Options) -> None:
    if options.granularity == OUTPUT:
        raise LoweringError(
            "save: with granularity='output' cheap steps don't run the model's graph, and a package holds variants of "
            "that graph. Compile with another granularity, or export a bundle (moeca_compile.export)"
        )
    if module.training:
        raise LoweringError("the model is in training mode: call model.eval() first")
    devices = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} - {"cpu"}
    if devices:
        raise LoweringError(
            f"save: the model is on {', '.join(sorted(devices))}, and packages are native code for CPUs. Move it "
            "to the CPU"
        )


def _arguments(module: torch.nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Arguments:
    """The inputs of a call as `request.call` takes them: by position, or else all by name.

    Raises:
        OptionError: the model's signature doesn't take them.
    """
    if not keywords:
        return tuple(inputs)
    try:
        bound = inspect.signature(module.forward).bind(*inputs, **keywords)
    except TypeError as error:
        raise OptionError(f"save: {type(module).__name__} doesn't take these inputs: {error}") from error
    if bound.args and any(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL)
        for name, parameter in bound.signature.parameters.items()
        if name in bound.arguments
    ):
        raise OptionError("save: inputs that the model takes by position alone can't be mixed with named ones")
    named = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named
