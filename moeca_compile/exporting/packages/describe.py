"""The parts of a package's manifest that say what the model and its calls are."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moeca_compile.dtypes import name_of
from moeca_compile.errors import LoweringError
from moeca_compile.exporting.describe import most_common_dtype
from moeca_compile.exporting.packages.call import ModelCall, leaf_spec, modules_of, structure_text
from moeca_compile.exporting.packages.programs import Programs
from moeca_compile.exporting.request import Captured
from moeca_compile.runtime.packages.manifest import (
    Argument,
    HoistedSpec,
    ModelSpec,
    ParameterSpec,
    Result,
    SizeSpec,
    StateSpec,
    ValueLeaf,
)


def describe_size(
    call: ModelCall, captured: Captured, programs: Programs, weights: dict[str, torch.Tensor]
) -> SizeSpec:
    """One kind of call.

    Args:
        call: that was captured.
        captured: the graph.
        programs: of the graph.
        weights: by name; those of this graph are added.

    Raises:
        LoweringError: a structure that can't be written down, or a result that the graph doesn't give.
    """
    program = captured.program
    variants, prologues = programs
    taken = {position for spec in (*variants, *prologues) for position in spec.takes}
    places = {id(leaf): i for i, leaf in enumerate(call.leaves) if isinstance(leaf, torch.Tensor)}
    arguments = []
    for position, (source, arg) in enumerate(zip(captured.inputs, captured.args, strict=True)):
        if id(arg) in places:
            arguments.append(Argument(leaf=places[id(arg)]))
        elif position in taken:
            arguments.append(Argument(weight=_named(weights, source.label, arg)))
        else:
            arguments.append(Argument())
    return SizeSpec(
        call=structure_text(call.structure, "the arguments"),
        leaves=tuple(call.specs),
        autocast=tuple((device, name_of(dtype)) for device, dtype in call.autocast),
        arguments=tuple(arguments),
        result=structure_text(call.result_structure, "the result"),
        results=tuple(_results(call, captured)),
        timesteps=program.prologues.timesteps,
        latent=program.latent,
        condition=program.condition,
        state=tuple(
            StateSpec(slot.name, slot.region, slot.output, str(slot.slot), slot.shape, slot.dtype, slot.bytes)
            for slot in program.layout
        ),
        hoisted=tuple(HoistedSpec(value.level, value.bytes) for value in program.prologues.hoisted),
        variants=tuple(variants),
        prologues=tuple(prologues),
    )


def describe_model(
    module: torch.nn.Module, weights: Mapping[str, torch.Tensor], calls: Sequence[ModelCall]
) -> ModelSpec:
    """The model: its signature, and its configuration where that is JSON."""
    modules = {name for call in calls for tree in (call.structure, call.result_structure) for name in modules_of(tree)}
    parameters = [
        ParameterSpec(one.name, int(one.kind), _default(one))
        for one in inspect.signature(module.forward).parameters.values()
    ]
    return ModelSpec(
        type(module).__name__,
        most_common_dtype(weights.values()),
        tuple(parameters),
        tuple(sorted(modules)),
        _config(module),
    )


def _named(weights: dict[str, torch.Tensor], label: str, tensor: torch.Tensor) -> str:
    """The name of a weight; it is added if it isn't there. Two tensors of one label get two names."""
    name, number = label, 1
    while name in weights and weights[name].data_ptr() != tensor.data_ptr():
        name, number = f"{label}#{number}", number + 1
    weights[name] = tensor.detach()
    return name


def _results(call: ModelCall, captured: Captured) -> list[Result]:
    outputs = {place: number for number, (_, place) in enumerate(captured.results)}
    handed_through = {id(leaf): i for i, leaf in enumerate(call.leaves) if isinstance(leaf, torch.Tensor)}
    results = []
    for place, leaf in enumerate(call.result_leaves):
        if place in outputs:
            results.append(Result(output=outputs[place]))
        elif id(leaf) in handed_through:
            results.append(Result(leaf=handed_through[id(leaf)]))
        elif isinstance(leaf, torch.Tensor):
            raise LoweringError("save: the model returns a tensor that its graph doesn't compute; return a copy of it")
        else:
            spec = leaf_spec("result", leaf)
            assert isinstance(spec, ValueLeaf)
            results.append(Result(value=spec))
    return results


def _default(parameter: inspect.Parameter) -> ValueLeaf | None:
    """The default of a parameter; None: it has none, or one that isn't a plain value, which a call must give."""
    if parameter.default is parameter.empty:
        return None
    try:
        spec = leaf_spec(parameter.name, parameter.default)
    except LoweringError:
        return None
    return spec if isinstance(spec, ValueLeaf) else None


def _config(module: torch.nn.Module) -> dict[str, Any] | None:
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        return None
    entries = {}
    for name, value in config.items():
        try:
            entries[str(name)] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return entries
