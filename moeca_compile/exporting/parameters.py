"""The model's parameters as a bundle lists them: which can be exchanged, and where their values lie.

And what an export says of weights that are no plain tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moeca_compile.dtypes import name_of
from moeca_compile.errors import warn
from moeca_compile.exporting.arrays import to_numpy
from moeca_compile.exporting.request import Captured
from moeca_compile.lowering.onnx.parameters import COMPUTED
from moeca_compile.lowering.onnx.quantized.keep import WIDENED
from moeca_compile.runtime.bundle.refit.parameters import ParameterSpec, ParameterTable, StoredSpec
from moeca_compile.runtime.bundle.refit.recipes import parameters_of

_NAMED = 3  # weights in a message


def parameter_table(
    model: torch.nn.Module, captured: Sequence[Captured], models: Iterable[Any], stored: Sequence[StoredSpec]
) -> ParameterTable:
    """The table of a bundle.

    Args:
        model: the one that was captured.
        captured: of each size the capture that was written.
        models: the graphs, as onnx_ir.Models.
        stored: the constants that are made of parameters.
    """
    exchangeable = {name for one in stored for name in parameters_of(one.recipe)}
    computed = frozenset[str]().union(*(graph.meta[COMPUTED] for graph in models))
    bound = {name for capture in captured for name in capture.parameters.values()}
    unnamed = {
        storage_of(weight)
        for capture in captured
        for name, weight in capture.weights.items()
        if name not in capture.parameters
    }
    names: dict[int, str] = {}
    specs: dict[str, ParameterSpec] = {}
    aliases: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):  # what a module keeps beside its tensors
            continue
        if (first := names.setdefault(id(value), name)) != name:
            aliases[name] = first
            continue
        is_read = name in bound or storage_of(value) in unnamed
        is_fixed = not is_plain(value) or name in computed or (is_read and name not in exchangeable)
        digest = hashlib.sha256(to_numpy(value).tobytes()).hexdigest() if is_fixed and is_plain(value) else None
        specs[name] = ParameterSpec(name_of(value.dtype), tuple(value.shape), is_fixed, digest)
    return ParameterTable(specs, aliases, tuple(stored))


def is_plain(value: torch.Tensor) -> bool:
    """Whether the values are the tensor's own: a subclass may hold others inside it."""
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def storage_of(value: torch.Tensor) -> int:
    """The address of the memory that a tensor's values are in; of a tensor without one, its identity."""
    try:
        return value.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return id(value)


def opaque_weights(model: torch.nn.Module) -> str:
    """Weights of classes that no graph can look into, for the end of an error's text; "" if there are none."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    named = [f"{name} ({type(value).__name__})" for name, value in state.items() if _is_opaque(value)]
    if not named:
        return ""
    return (
        f". {len(named)} weights are of classes that no graph can look into, as they have no __tensor_flatten__: "
        f"{_some(named)}. Quantize with torchao's Int8WeightOnlyConfig or IntxWeightOnlyConfig, or put plain weights in"
    )


def _is_opaque(value: Any) -> bool:
    has_dispatch = getattr(type(value), "__torch_dispatch__", None) not in (None, torch.Tensor.__torch_dispatch__)
    return has_dispatch and not is_traceable_wrapper_subclass(value)


def warn_of_widened(model: torch.nn.Module, mains: Sequence[Captured], graphs: Iterable[Any], dtype: str) -> None:
    """Warn of quantized weights that the graphs hold in floating point.

    Args:
        model: the one that was captured.
        mains: of each size the capture that was written.
        graphs: as onnx_ir.Models.
        dtype: what they compute in.
    """
    widened = frozenset[str]().union(*(graph.meta[WIDENED] for graph in graphs))
    labels = dict.fromkeys(entry.label for main in mains for entry in main.inputs if entry.name in widened)
    state = model.state_dict(keep_vars=True)
    named = []
    for label in labels:
        owner = next((name for name in (label, label.rpartition(".")[0]) if name in state), label)
        named.append(f"{owner} ({type(state[owner]).__name__ if owner in state else 'a tensor of 8 bits'})")
    if named:
        warn(
            f"{len(named)} quantized weights become {dtype} in the bundle, which is larger for it: {_some(named)}. A "
            "bundle keeps int8 and int4 weights with a scale for each row or group, of linear layers and experts, as "
            "torchao's Int8WeightOnlyConfig and IntxWeightOnlyConfig make them"
        )


def _some(named: Sequence[str]) -> str:
    rest = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return f"{', '.join(named[:_NAMED])}{rest}"
