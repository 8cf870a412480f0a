"""A model's output as a weighted sum, in numpy: in float32 for float16 and bfloat16, which come as their bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeca_compile.runtime.bundle import bfloat16


def wide(array: Any, dtype: str) -> Any:
    """An array as a runtime stores it, in at least float32; a float32 or float64 as it is."""
    array = bfloat16.from_stored(array, dtype)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def polynomial(outputs: Sequence[Any], dtype: str, weights: Sequence[float]) -> Any:
    """w0 y0 + w1 y1 + ...; y0 where it isn't a floating number.

    Args:
        outputs: the model's last outputs, latest first, as a runtime stores them.
        dtype: of the outputs.
        weights: w0, w1, ..., without unit.

    Returns:
        A new array, as a runtime stores it.
    """
    if dtype != bfloat16.NAME and outputs[0].dtype.kind != "f":
        return outputs[0].copy()
    total = weights[0] * wide(outputs[0], dtype)
    for value, weight in zip(outputs[1:], weights[1:], strict=False):
        if weight:
            total += weight * wide(value, dtype)
    return _stored(total, dtype)


def weighted(
    terms: Sequence[str], weights: Sequence[float], outputs: Sequence[Any], dtype: str, latent: Any, latent_dtype: str
) -> Any:
    """The sum of an output rule (`schedule/output.py`).

    Args:
        terms: names of the values.
        weights: one for each term, without unit. A value with weight 0 isn't read.
        outputs: the model's last outputs [B, C, ...], latest first, as a runtime stores them.
        dtype: of the outputs.
        latent: [B, at most C, ...], as a runtime stores it; channels that it lacks count as 0. None: no term has it.
        latent_dtype: of the latent.

    Returns:
        A new array [B, C, ...], as a runtime stores it.
    """
    total = np.zeros_like(wide(outputs[0], dtype))
    for term, weight in zip(terms, weights, strict=True):
        if not weight:
            continue
        if term == "x":
            total[:, : latent.shape[1]] += weight * wide(latent, latent_dtype)
        elif term[0] == "y":
            total += weight * wide(outputs[int(term[1])], dtype)
        else:
            first, second = np.split(wide(outputs[int(term[1])], dtype), 2)
            total += np.concatenate(2 * [weight * (first - second)])
    return _stored(total, dtype)


def _stored(array: Any, dtype: str) -> Any:
    return bfloat16.rounded(array) if dtype == bfloat16.NAME else array.astype(dtype, copy=False)
