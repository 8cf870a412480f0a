"""Arrays of several requests as those of one call, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.dims import parts
from moeca_compile.runtime.bundle.manifest import TensorSpec


def batch_axis(spec: TensorSpec) -> int | None:
    """The axis along which the samples of a tensor lie; None: it doesn't depend on the batch.

    Raises:
        BundleError: several sizes depend on the batch, or one isn't a multiple of it.
    """
    axes = [axis for axis, dim in enumerate(spec.shape) if isinstance(dim, str)]
    if len(axes) > 1 or (axes and parts(spec.shape[axes[0]])[1]):
        raise BundleError(f"{spec} can't be cut into samples: requests can't share a call. Use Session")
    return axes[0] if axes else None


def joined(arrays: Sequence[Any], axis: int) -> Any:
    """Arrays one after another along an axis. Neighbors in one allocation are joined without a copy."""
    first = arrays[0]
    if len(arrays) == 1:
        return first
    if axis == 0 and first.base is not None and _are_neighbors(arrays):
        rows = sum(len(array) for array in arrays)
        return np.lib.stride_tricks.as_strided(first, (rows, *first.shape[1:]), first.strides)
    return np.concatenate(arrays, axis)


def split(array: Any, axis: int, size: int, batches: Sequence[int]) -> list[Any]:
    """A part for each of these batches, whose samples have `size` along the axis: views along axis 0, else copies."""
    first, views = 0, []
    for batch in batches:
        index = [slice(None)] * axis + [slice(first * size, (first + batch) * size)]
        views.append(np.ascontiguousarray(array[tuple(index)]))
        first += batch
    return views


def _are_neighbors(arrays: Sequence[Any]) -> bool:
    """Whether each array begins where the one before ends, in the memory of one owner."""
    owner, end = arrays[0].base, arrays[0].ctypes.data
    for array in arrays:
        if array.base is not owner or not array.flags.c_contiguous or array.ctypes.data != end:
            return False
        end += array.nbytes
    return True
