"""The arrays of one call as every runtime takes them, or a refusal that names the input.

A runtime gets an address, sizes and a type's name. What these don't tell (byte order, strides, alignment, a mask) is
settled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle import bfloat16
from moeca_compile.runtime.bundle.manifest import InputSpec, Manifest, TensorSpec

Arrays = dict[str, Any]  # numpy arrays by the name of an input or output


def arrays_of(manifest: Manifest, inputs: Mapping[str, Any]) -> Arrays:
    """The inputs as contiguous, aligned, writable arrays in the machine's byte order; shapes aren't looked at.

    Raises:
        BundleError: no mapping, other names or dtypes than the model takes, or a value that is no plain array.
    """
    if not isinstance(inputs, Mapping):
        raise BundleError(
            f"inputs: expected arrays by name, got {type(inputs).__name__}; the model takes {_said(manifest)}"
        )
    if set(inputs) != {spec.name for spec in manifest.inputs}:
        raise BundleError(f"inputs {sorted(map(str, inputs))}: the model takes {_said(manifest)}")
    return {spec.name: _array(spec, inputs[spec.name]) for spec in manifest.inputs}


def admit(manifest: Manifest, arrays: Arrays) -> tuple[Arrays, int]:
    """What `arrays_of` gave as a runtime's inputs, and their batch (1 where nothing depends on it).

    Raises:
        BundleError: other shapes or batches than the model takes, or integers outside the table that they index.
    """
    feeds, batch = {}, -1
    for spec in manifest.inputs:
        array = arrays[spec.name]
        own_batch = spec.batch_of(array.shape)
        if own_batch is None or (own_batch != -1 and batch not in (-1, own_batch)):
            others = f" (the other inputs have batch {batch})" if own_batch is not None else ""
            raise BundleError(f"input {spec.name} has shape {list(array.shape)}, the model takes {spec}{others}")
        batch = max(batch, own_batch)
        if spec.range is not None:
            _refuse_outside(spec, array)
        feeds[spec.name] = array
    if manifest.batch is not None and batch != -1 and not manifest.batch[0] <= batch <= manifest.batch[1]:
        raise BundleError(
            f"the inputs have batch {batch}; the bundle was exported for batches {manifest.batch[0]} to "
            f"{manifest.batch[1]}"
        )
    return feeds, max(batch, 1)


def _array(spec: TensorSpec, value: Any) -> Any:
    """bfloat16 is given as float32, and becomes its bits."""
    if np.ma.is_masked(value):
        raise BundleError(f"input {spec.name} is a masked array, and a model takes all of it: give value.filled(...)")
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever the object's own conversion raises
        raise BundleError(f"input {spec.name} is no array: {type(error).__name__}: {error}") from error
    if spec.dtype == bfloat16.NAME:
        if array.dtype.name not in ("float32", bfloat16.NAME):
            raise BundleError(f"input {spec.name} has dtype {array.dtype}, give float32 for {spec}")
        array = bfloat16.to_stored(array) if array.dtype.name == bfloat16.NAME else bfloat16.rounded(array)
    elif array.dtype.name != spec.dtype:
        raise BundleError(f"input {spec.name} has dtype {array.dtype}, the model takes {spec}")
    # writable: OpenVINO refuses memory that it could not write to
    return np.require(array, array.dtype.newbyteorder("="), ("C", "A", "W"))


def _refuse_outside(spec: InputSpec, array: Any) -> None:
    """What a runtime makes of such an index is its own: a wrapped one, an error, or whatever lies there."""
    assert spec.range is not None
    low, end = spec.range
    if array.size and (array.min() < low or array.max() >= end):
        raise BundleError(
            f"input {spec.name} has values from {array.min()} to {array.max()}, and it indexes a table: the model "
            f"takes {low} to {end - 1}"
        )


def _said(manifest: Manifest) -> str:
    return ", ".join(map(str, manifest.inputs))
