"""The model's parameters as a bundle lists them: which can be exchanged, and where their values lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from moeca_compile.dtypes import name_of
from moeca_compile.exporting.arrays import to_numpy
from moeca_compile.exporting.request import Captured
from moeca_compile.lowering.onnx.parameters import COMPUTED
from moeca_compile.runtime.bundle.refit.parameters import ParameterSpec, ParameterTable, StoredSpec
from moeca_compile.runtime.bundle.refit.recipes import parameters_of


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
