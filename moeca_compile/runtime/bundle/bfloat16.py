"""bfloat16 in numpy, which doesn't know it: as float32 at the face, as bits in uint16 in files and in runtimes."""

from __future__ import annotations

from typing import Any

import numpy as np

NAME = "bfloat16"


def stored_dtype(dtype: str) -> Any:
    """The numpy dtype that holds values of `dtype`."""
    return np.dtype(np.uint16 if dtype == NAME else dtype)


def to_stored(array: Any) -> Any:
    """An array of some package's bfloat16 as its bits; any other array as it is."""
    return array.view(np.uint16) if array.dtype.name == NAME else array


def from_stored(array: Any, dtype: str) -> Any:
    """The array as it is; bfloat16's bits widened to float32, which is exact."""
    if dtype == NAME and array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def rounded(array: Any) -> Any:
    """float32 to the bits of the nearest bfloat16, ties to even; a NaN stays one."""
    bits = array.astype(np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), (bits >> 16) | 0x40, nearest).astype(np.uint16)
